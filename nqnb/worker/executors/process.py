"""The third way to run a handler: in a process of its own, in a group of its own, which always stops.

A stop climbs: SIGINT at once (`JobCancelled` in the handler), SIGTERM after ``grace``, SIGKILL a quarter second later.
However a run ends, what its process has started and left behind is killed before it counts as ended: on Linux every
descendant, elsewhere its process group. The function and its arguments are pickled by cloudpickle, so one from a
notebook or a closure will do; what it returns comes back as JSON. The environment variables go the same way, over a
socket that only the two processes have.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no types
import msgspec

from nqnb.errors import BadInput, InvalidHandler, UnencodableValue
from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Progress
from nqnb.worker.executors.executor import Executor, Result
from nqnb.worker.executors.process_pool import Spares, TaskProcess, environment
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job

LAST = 0.25
"""Seconds from SIGTERM to SIGKILL."""
_LEAVING = 1.0
"""Seconds that a process whose handler has ended may take to end too (``atexit``, threads that it has left)."""


class ProcessEnded(Exception):
    """The process of a handler ended, and the handler had not."""


class UnencodableResult(UnencodableValue):
    """What a handler returned in its process cannot be a result."""


class ProcessExecutor(Executor):
    """Runs a handler in a process of its own."""

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self.how = "its process was interrupted"
        self._loop = asyncio.get_running_loop()
        self._process: TaskProcess | None = None
        self._outcome: Result | None = None
        self._raised: Told | None = None
        self._rebuilding: asyncio.Task[BaseException] | None = None
        self._timers: list[asyncio.TimerHandle] = []

    async def _run(self) -> Result:
        try:
            arguments = self._handler.arguments(self._job)
            call = _pickled(self._handler, arguments)
            process = self._process = Spares.here().take()
        except Exception as refused:  # noqa: BLE001  whatever the payload does to its decoder is the task's failure
            return Result(Ended.FAILED, error=refused)
        process.hear = self._hear
        job = self._job
        facts = (job.id, job.queue, job.payload, job.attempt, job.max_retry, job.deadline)
        process.send((sys.path, _folder(), environment(), facts, call))
        try:
            status = await asyncio.shield(process.ended)
        finally:
            process.kill()
            for timer in self._timers:
                timer.cancel()
        if self._raised is not None and self._is_judged():
            self._rebuilding = asyncio.ensure_future(rebuilt(self._raised))
            await asyncio.wait([self._rebuilding])
            if not self._rebuilding.cancelled():
                return Result(Ended.FAILED, error=self._rebuilding.result())
        return self._outcome or self._without_outcome(status)

    def _is_judged(self) -> bool:
        """Whether ``is_failure`` will see what the handler has raised."""
        retries_left = self._job.attempt <= self._job.max_retry
        return self._handler.is_failure is not None and retries_left and not self._stopping

    def _begin_to_stop(self) -> None:
        if self._process is not None and self._outcome is None:
            self._process.interrupt()
            self._later(self._handler.grace, self._terminate, self._process)
        if self._rebuilding is not None:
            self._rebuilding.cancel()

    def _hurry(self, within: float) -> None:
        process = self._process
        if process is None:
            return
        # What is due sooner by the handler's grace stays; a further step does nothing to a process that has ended.
        if self._outcome is None:
            self._later(within / 4, self._terminate, process)
        self._later(within / 2, self._kill, process)

    def _later(self, seconds: float, step: Callable[[TaskProcess], None], process: TaskProcess) -> None:
        self._timers.append(self._loop.call_later(seconds, step, process))

    def _terminate(self, process: TaskProcess) -> None:
        if self._outcome is None:
            self.how = "its process was terminated"
        process.terminate()
        self._later(LAST, self._kill, process)

    def _kill(self, process: TaskProcess) -> None:
        if self._outcome is None:
            self.how = "its process was killed"
        process.kill()

    def _hear(self, message: tuple[Any, ...]) -> None:
        what, *told = message
        if what == "said":
            progress, lines = told
            self._job.state.report(progress and Progress(*progress), lines)
            return
        if what == "returned":
            # The JSON goes on as it is: to decode it only for the entry would change numbers that JSON alone can hold.
            value = None if told[0] == b"null" else msgspec.Raw(told[0])
            self._outcome = Result(Ended.RETURNED, value)
        elif what == "useless":
            self._outcome = Result(Ended.FAILED, error=UnencodableResult(*told))
        else:
            self._raised = Told(*told)
            self._outcome = Result(Ended.FAILED, error=stand_in(self._raised))
        if self._process is not None:
            self._later(_LEAVING, self._kill, self._process)

    def _without_outcome(self, status: int | None) -> Result:
        # A rung that came while the one before did its work has done nothing.
        if status == -signal.SIGINT:
            self.how = "its process was interrupted"
        elif status == -signal.SIGTERM:
            self.how = "its process was terminated"
        return Result(Ended.FAILED, error=ProcessEnded(_end_text(status)))


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return os.curdir


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends what msgspec has had its hands on."""

    def reducer_override(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        if isinstance(obj, type):
            if "__msgspec_cache__" in vars(obj):
                # It cannot travel, and is made anew when needed.
                del obj.__msgspec_cache__  # type: ignore[attr-defined]
            if issubclass(obj, msgspec.Struct) and not _importable(obj):
                raise pickle.PicklingError(
                    f"the Struct {obj.__qualname__} is not in a module; move it into one, or make it a dataclass"
                )
        return super().reducer_override(obj)


def _importable(kind: type) -> bool:
    found: Any = sys.modules.get(kind.__module__) if kind.__module__ != "__main__" else None
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _pickled(handler: Handler, arguments: tuple[Any, ...]) -> bytes:
    data = io.BytesIO()
    try:
        _Pickler(data).dump((handler.function, handler.is_coroutine, arguments))
    except Exception as error:
        name = getattr(handler.function, "__qualname__", repr(handler.function))
        hint = "; open connections, locks and the like inside of it" if isinstance(error, TypeError) else ""
        raise InvalidHandler(f"{name} cannot be sent to a process ({type(error).__name__}: {error}){hint}") from error
    return data.getvalue()


def _end_text(status: int | None) -> str:
    if status is None:
        return "its process is gone, and so is the one that watched over it"
    if status >= 0:
        return f"its process ended with exit code {status} before the handler returned"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    hint = " (out of memory, or killed by somebody)" if status == -signal.SIGKILL else ""
    return f"its process ended with signal {name}{hint}"


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
