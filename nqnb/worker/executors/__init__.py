"""The three ways to run and stop a handler: on the event loop, in a thread, or in a process.

A run counts as returned once its executor has received the return value. `Executor.stop` makes repeated attempts to
stop the handler until the handler has ended:

- A coroutine is cancelled immediately, and then again every ``grace`` seconds.
- For a function in a thread, ``job.cancelled`` becomes true immediately. If the function keeps running, `JobCancelled`
  is raised in the thread every ``grace`` seconds, but only when this is safe (see `nqnb.worker.executors.thread`). A
  thread inside a long C call cannot be stopped before the call returns, so the executor waits for the call.
- A process receives SIGINT, then SIGTERM, and finally SIGKILL (see `nqnb.worker.executors.process`).

When the lease is running out, `stop` receives the number of seconds that are left. All stop attempts are then made
within that time, even if ``grace`` is longer.
"""

from __future__ import annotations

from nqnb.worker.executors.coroutine import CoroutineExecutor
from nqnb.worker.executors.executor import Executor
from nqnb.worker.executors.thread import ThreadExecutor
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


def make_executor(handler: Handler, job: Job) -> Executor:
    """Return the executor that matches the handler's isolation."""
    if handler.isolation == "process":
        # Import late, because only workers with such a handler need this module.
        from nqnb.worker.executors.process import ProcessExecutor

        return ProcessExecutor(handler, job)
    return CoroutineExecutor(handler, job) if handler.is_coroutine else ThreadExecutor(handler, job)
