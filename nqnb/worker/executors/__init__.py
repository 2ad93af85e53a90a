"""Three ways to run a handler and to stop it: on the event loop, in a thread, in a process.

A run has "returned" once its executor has received the return value. `Executor.stop` repeats a push until the code has
ended:

- A coroutine is cancelled at once, and again after each ``grace``.
- A function in a thread sees ``job.cancelled`` at once. After each ``grace`` that it ignores, `JobCancelled` is raised
  in it as soon as that is safe (see `nqnb.worker.executors.thread`). A thread inside one long C call cannot be stopped
  before that call returns; the executor waits for it.
- A process gets SIGINT, SIGTERM and SIGKILL (see `nqnb.worker.executors.process`).

When the lease runs out, `stop` gets the seconds that are left. All pushes then come in that time, whatever ``grace``
says.
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
        # Only a worker that has such a handler loads what processes need.
        from nqnb.worker.executors.process import ProcessExecutor

        return ProcessExecutor(handler, job)
    return CoroutineExecutor(handler, job) if handler.is_coroutine else ThreadExecutor(handler, job)
