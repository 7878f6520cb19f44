"""A model on a real cluster under a real Prometheus: every query of the dashboards is asked."""
