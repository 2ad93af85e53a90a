"""Find inconsistencies between entries, messages, workers and configuration, and make safe repairs."""
