"""Cancels many tasks: all of them first, and only then waits for their code to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence

from nqnb.client import IN_FLIGHT, Client
from nqnb.errors import NotCancellable, NqnbError
from nqnb.protocol.bulk import AT_ONCE, outcomes_of
from nqnb.records import CancelReceipt


async def cancel_all(
    nq: Client,
    ids: Sequence[str],
    wait: float | None,
    outcomes: MutableMapping[str, CancelReceipt | NqnbError],
    tell: Callable[[int, int, str], object] = lambda done, total, what: None,
) -> None:
    """Cancel all of them, whatever becomes of some; the wait for their code begins when all were cancelled.

    Args:
        nq: the client.
        ids: the tasks.
        wait: seconds to wait for all their code to stop; None does not wait.
        outcomes: what becomes of each is put in here as it is known, so that whoever interrupts this has it.
        tell: is told how many are done, of how many, and what that means.
    """

    async def each(some: Sequence[str], left: Callable[[], float | None], what: str, at_once: int) -> None:
        done = 0

        async def one(id: str) -> None:
            nonlocal done
            try:
                outcomes[id] = await nq.cancel(id, left())
            except NqnbError as error:
                # An answer that was lost while we waited does not undo a cancel that is stored.
                if id not in outcomes or isinstance(error, NotCancellable):
                    outcomes[id] = error
            done += 1
            tell(done, len(some), what)

        await outcomes_of(some, one, min(at_once, len(some)))

    await each(ids, lambda: None, "tasks cancelled", AT_ONCE)
    if wait is None:
        return
    deadline = time.monotonic() + wait

    def left() -> float | None:
        """For whom the wait came too late to begin, a cancel without one says how things stand."""
        seconds = deadline - time.monotonic()
        return seconds if seconds > 0 else None

    if running := [each for each in ids if isinstance(got := outcomes[each], CancelReceipt) and got.stopping]:
        await each(running, left, "stopped", IN_FLIGHT)
