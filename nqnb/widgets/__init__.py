"""Live tables of tasks. A table does not depend on a session: it receives changes, and a ``cancel`` to call."""
