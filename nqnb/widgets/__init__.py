"""Live tables of tasks. They do not depend on sessions: a table receives batches of changes, and a ``cancel`` to call."""
