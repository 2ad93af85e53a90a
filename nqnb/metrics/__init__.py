"""Metrics for Prometheus: those of one worker, and those of the whole server."""
