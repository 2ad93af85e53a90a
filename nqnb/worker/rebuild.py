"""Exceptions of a handler's own process, in the worker: as a stand-in of the same name and text, or made again.

To make one again imports the module of its class, which may take seconds or never end. So that is done only for a
handler with ``is_failure``, in a thread, and for a bounded time. All else that the worker does with an exception, the
stand-in can do: it has the type's name, the text, the notes and the traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import threading
from dataclasses import dataclass
from typing import Any

from nqnb.errors import BadInput

log = logging.getLogger("nqnb.worker")

REBUILDING_TAKES = 30.0
"""Seconds that making an exception again may take."""

_late: dict[tuple[str, str], threading.Thread] = {}
"""The threads that took longer, by the class's module and name: while one goes on, no second one is started."""


@dataclass(frozen=True, slots=True)
class Told:
    """An exception as the handler's process describes it.

    Attributes:
        module: the module of its class.
        name: the qualified name of its class.
        text: what ``str`` makes of it.
        notes: those of ``add_note``.
        trace: the traceback that it had.
        final: whether it is a `BadInput`, which no retry can help.
        data: pickled, the class, the arguments and the attributes; None where they cannot be pickled.
    """

    module: str
    name: str
    text: str
    notes: list[str]
    trace: str
    final: bool
    data: bytes | None


class ProcessTraceback(Exception):
    """Stands as the cause of an exception from another process, and shows the traceback that it had there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def stand_in(told: Told) -> Exception:
    """Return an exception of the same name and text."""
    name = told.name.replace("\0", "?").encode(errors="replace").decode()  # what `type` takes
    kind = type(name, (BadInput if told.final else Exception,), {"__module__": told.module, "__qualname__": told.name})
    error: Exception = kind(told.text)
    if told.notes:
        error.__notes__ = told.notes  # type: ignore[attr-defined]  # Python 3.10 prints none, and takes it
    error.__cause__ = ProcessTraceback(told.trace)
    return error


async def rebuilt(told: Told) -> BaseException:
    """Return the handler's exception made again; where that cannot be, or takes too long, a stand-in."""
    kind = (told.module, told.name)
    if told.data is None or (kind in _late and _late[kind].is_alive()):
        return stand_in(told)
    loop = asyncio.get_running_loop()
    made: asyncio.Future[BaseException | None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if not made.done():
            made.set_result(error)

    def make() -> None:
        error = _make(told)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, error)

    # A daemon, for the loop's own threads are waited for at its end.
    thread = threading.Thread(target=make, name="nqnb-rebuild", daemon=True)
    thread.start()
    try:
        error = await asyncio.wait_for(made, REBUILDING_TAKES)
    except asyncio.TimeoutError:
        _late[kind] = thread
        log.warning(
            "is_failure judges a stand-in for %s.%s: importing its class in the worker takes longer than %g s. "
            "The stand-in has the same name and text.",
            *(told.module, told.name, REBUILDING_TAKES),
        )
        return stand_in(told)
    if error is None:
        return stand_in(told)
    error.__cause__ = ProcessTraceback(told.trace)
    return error


def _make(told: Told) -> BaseException | None:
    try:
        kind, arguments, state = pickle.loads(told.data or b"")  # noqa: S301  from a process of ours
    except BaseException:  # noqa: BLE001  its class may exist only there, and its module may do anything
        return None
    # Its __init__ may take other arguments than those that it passed on; some classes of C set all up in theirs.
    for make in (kind.__new__, lambda kind, *arguments: kind(*arguments)):
        try:
            error: Any = make(kind, *arguments)
            error.__dict__.update(state)
            if isinstance(error, BaseException) and str(error)[: len(told.text)] == told.text:
                return error
        except BaseException:  # noqa: BLE001, S112  the class may do anything
            continue
    return None
