"""Faults between the operator and the API server, for the fault suite."""
