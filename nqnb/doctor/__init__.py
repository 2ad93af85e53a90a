"""Find inconsistencies between entries, messages, workers and configuration, and make the safe repairs."""
