"""The three ways to run and stop a handler: on the event loop, in a thread, or in a process.

A run has "returned" once its executor has received the return value. `Executor.stop` keeps pushing the code to stop
until the code has ended:

- A coroutine is cancelled at once, and again after each ``grace``.
- A function in a thread sees ``job.cancelled`` at once. After each ``grace`` that it ignores, `JobCancelled` is raised
  in it as soon as that is safe (see `nqnb.worker.executors.thread`). A thread inside a long C call can be stopped only
  after the call has returned, so the executor waits for the call.
- A process receives SIGINT, SIGTERM and SIGKILL (see `nqnb.worker.executors.process`).

When the lease is running out, `stop` receives the number of seconds that are left. All pushes are then sent within that
time, even if ``grace`` is longer.
"""

from __future__ import annotations

from nqnb.worker.executors.coroutine import CoroutineExecutor
from nqnb.worker.executors.executor import Executor
from nqnb.worker.executors.thread import ThreadExecutor
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job


def make_executor(handler: Handler, job: Job) -> Executor:
    """Return the executor for a handler's isolation."""
    if handler.isolation == "process":
        # Import late, because only workers with such a handler need this module.
        from nqnb.worker.executors.process import ProcessExecutor

        return ProcessExecutor(handler, job)
    return CoroutineExecutor(handler, job) if handler.is_coroutine else ThreadExecutor(handler, job)
