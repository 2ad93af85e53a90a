"""Everything that decides or changes the state of a task: the wire format, the verdicts, the operations."""
