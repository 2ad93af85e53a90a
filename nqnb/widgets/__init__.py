"""Live tables of tasks. They know nothing of sessions: a table is fed batches and is handed a ``cancel`` to call."""
