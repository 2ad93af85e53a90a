"""The full-screen view of ``nqnb top``: queues, tasks and workers in a terminal. This package imports textual."""
