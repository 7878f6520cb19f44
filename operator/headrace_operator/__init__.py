"""Kubernetes operator for ModelDeployment custom resources."""
