"""Log cancelled tasks whose code does not stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from nqnb.worker.run import Run

log = logging.getLogger("nqnb.worker")

WARN_AFTER_SECONDS = 10.0
"""The age of a cancel, in seconds, at which the worker warns that the task's code is still running.

If twice the handler's ``grace`` is longer, the worker waits for that time, because the first attempts to stop the code
may be late.
"""
_CHECKS = 10
"""The number of checks in `WARN_AFTER_SECONDS`."""
_ADVICE = {
    "coroutine": "The code may catch asyncio.CancelledError and continue. Re-raise this error in the handler",
    "thread": (
        "The code is in a long call, waits in `threading` or `queue`, or catches JobCancelled. Check `job.cancelled` "
        'in the handler, or use isolation="process", which can always be stopped'
    ),
    "process": "The worker is killing the process that runs the code",
}
"""The advice in the warning, by the handler's isolation."""


async def warn_of_ignored_cancels(runs: Mapping[str, Run], now: Callable[[], float]) -> None:
    """Log a warning for each cancelled run whose code does not stop, once per run. Continue until cancelled.

    Args:
        runs: the worker's runs, by task id.
        now: a function that returns the server's time in Unix seconds.
    """
    warned: set[Run] = set()
    while True:
        await asyncio.sleep(WARN_AFTER_SECONDS / _CHECKS)
        warned.intersection_update(runs.values())
        for run in list(runs.values()):
            if run.cancel is None or not run.started or run.finishing or run in warned:
                continue
            age = now() - run.cancel.delivered_at
            if age >= max(WARN_AFTER_SECONDS, 2 * run.handler.grace):
                warned.add(run)
                line = "" if run.executor is None else run.executor.line()
                log.warning(
                    "task %s of queue %s was cancelled %.0f s ago, but its code is still running%s. %s. To end the "
                    "code now, stop the worker's process. See \"When a cancel does not end\" in nqnb's "
                    "docs/cancelling.md",
                    run.id,
                    run.delivery.queue,
                    age,
                    f" at {line}" if line else "",
                    _ADVICE[run.handler.isolation],
                    extra=run.log_fields(),
                )
