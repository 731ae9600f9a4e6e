"""Metrics, traces, logs and health as layers around the tunnel's handlers; plugged in by name (entry points)."""
