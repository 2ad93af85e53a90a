"""The task protocol: the message format, the rules for each state change, and the operations on tasks."""
