"""Live tables of tasks. A table does not depend on a session: the caller passes changes and a cancel callback."""
