"""Handover protocol between loader and engine: messages and file descriptors over a unix socket."""
