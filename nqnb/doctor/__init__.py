"""Find inconsistencies between entries, messages, workers, schedules and configuration, and make safe repairs."""
