"""Grafana dashboards of the chart, generated with Grafana's own typed builders."""
