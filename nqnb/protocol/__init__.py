"""The code that decides or changes the state of a task: the wire format, the verdicts and the operations."""
