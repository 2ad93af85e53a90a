"""Prometheus metrics of a single worker, and of the whole server."""
