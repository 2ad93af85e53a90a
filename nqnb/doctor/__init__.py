"""Finds what does not fit between entries, messages, workers and configuration, and repairs what is safe."""
