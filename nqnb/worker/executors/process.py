"""Run a handler in a separate process, which can always be stopped.

To stop the handler, the worker sends signals to the process group: SIGINT immediately (which raises `JobCancelled`),
SIGTERM after ``grace`` seconds, and SIGKILL a quarter of a second later. Before the run counts as ended, any processes
that the handler has left running are killed: all descendants on Linux, and the process group on other systems.

The function and its arguments are pickled with cloudpickle, so the function may be a closure or be defined in a
notebook. Over a private socket, the worker sends the pickled call and its own environment variables, and receives the
result as JSON.

In the worker, an exception that the handler raised is replaced by a stand-in with the same name, text, notes and
traceback. Rebuilding the original exception would import the module that defines its class, and such an import may take
seconds or never finish. Therefore, the exception is rebuilt only if the handler has an ``is_failure`` function. The
rebuilding runs in a thread with a time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import operator
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no types
import msgspec

from nqnb import tracing
from nqnb.errors import BadInput, InvalidHandler, UnencodableValue
from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Progress
from nqnb.worker.executors.executor import Executor, ProcessTraceback, Result
from nqnb.worker.executors.process_pool import Spares, TaskProcess, environment
from nqnb.worker.handlers import Handler
from nqnb.worker.job import Job
from nqnb.worker.typed_task import TaskFunction

log = logging.getLogger("nqnb.worker")

KILL_DELAY_SECONDS = 0.25
"""The delay between SIGTERM and SIGKILL."""
REBUILD_TIMEOUT_SECONDS = 30.0
"""The time limit for rebuilding an exception."""
_EXIT_TIMEOUT_SECONDS = 1.0
"""The time limit for a process to exit after the handler has ended. ``atexit`` functions run in this time."""


class ProcessEnded(Exception):
    """The error that is recorded if a handler's process exits before the handler returns."""


class UnencodableResult(UnencodableValue):
    """The error that is recorded if a handler in a process returns a value that JSON cannot represent."""


class ProcessExecutor(Executor):
    """An executor that runs a handler in a separate process."""

    def __init__(self, handler: Handler, job: Job) -> None:
        super().__init__(handler, job)
        self.how = "its process was interrupted"
        self._loop = asyncio.get_running_loop()
        self._process: TaskProcess | None = None
        self._over: asyncio.Future[int | None] | None = None
        """A future that is resolved when the process has finished the task."""
        self._outcome: Result | None = None
        self._raised: RemoteError | None = None
        self._rebuilding: asyncio.Task[BaseException] | None = None
        self._timers: list[asyncio.TimerHandle] = []

    async def _run(self) -> Result:
        try:
            arguments = self._handler.arguments(self._job)
            call = _pickle_call(self._handler, arguments)
            process = self._process = Spares.here().take(self._handler)
        except Exception as refused:  # noqa: BLE001  decoding the payload may raise anything
            return Result(Ended.FAILED, error=refused)
        job = self._job
        facts = (job.id, job.queue, job.payload, job.attempt, job.max_retry, job.deadline)
        where = (sys.path, _current_folder(), environment())
        trace = {} if tracing.active is None else tracing.active.headers()
        task = (facts, job.state.progress_raises, job.state.lines is not None, call, trace)
        over = self._over = process.run(self._handler, self._receive, *where, *task)
        try:
            status = await asyncio.shield(over)
        finally:
            for timer in self._timers:
                timer.cancel()
            Spares.here().free(process)
        if self._raised is not None and self._is_judged():
            self._rebuilding = asyncio.ensure_future(rebuild(self._raised))
            await asyncio.wait([self._rebuilding])
            if not self._rebuilding.cancelled():
                return Result(Ended.FAILED, error=self._rebuilding.result())
        return self._outcome or self._without_outcome(status)

    def _is_judged(self) -> bool:
        """Return whether ``is_failure`` will be called with the handler's exception."""
        retries_left = self._job.attempt <= self._job.max_retry
        return self._handler.is_failure is not None and retries_left and not self._stopping

    def _begin_to_stop(self) -> None:
        if self._process is not None and self._outcome is None:
            self._process.interrupt()
            self._schedule(self._handler.grace, self._terminate, self._process)
        if self._rebuilding is not None:
            self._rebuilding.cancel()

    def _hurry(self, within: float) -> None:
        process = self._process
        if process is None:
            return
        # Steps that are already due sooner are kept. A step has no effect on a process that has exited.
        if self._outcome is None:
            self._schedule(within / 4, self._terminate, process)
        self._schedule(within / 2, self._kill, process)

    def _schedule(self, seconds: float, step: Callable[[TaskProcess], None], process: TaskProcess) -> None:
        def take_step() -> None:
            # If the run is over, the process may already belong to another task.
            if self._over is not None and not self._over.done():
                step(process)

        self._timers.append(self._loop.call_later(seconds, take_step))

    def _terminate(self, process: TaskProcess) -> None:
        if self._outcome is None:
            self.how = "its process was terminated"
        process.terminate()
        self._schedule(KILL_DELAY_SECONDS, self._kill, process)

    def _kill(self, process: TaskProcess) -> None:
        if self._outcome is None:
            self.how = "its process was killed"
        process.kill()

    def _receive(self, message: tuple[Any, ...]) -> None:
        kind, *values = message
        if kind == "report":
            progress, log_lines, new_lines = values
            if self._job.state.lines is not None:
                self._job.state.lines.extend(new_lines)
            self._job.state.report(progress and Progress(*progress), log_lines)
            return
        if kind == "returned":
            # Keep the JSON unchanged: decoding it would change numbers that only JSON can represent.
            data, is_bytes = values
            value = None if data == b"null" else msgspec.Raw(data)
            self._outcome = Result(Ended.RETURNED, msgspec.json.decode(data, type=bytes) if is_bytes else value)
        elif kind == "unencodable":
            self._outcome = Result(Ended.FAILED, error=UnencodableResult(*values))
        else:
            self._raised = RemoteError(*values)
            self._outcome = Result(Ended.FAILED, error=stand_in(self._raised))
        if self._process is not None:
            self._schedule(_EXIT_TIMEOUT_SECONDS, self._kill, self._process)

    def _without_outcome(self, status: int | None) -> Result:
        # A later step may have become due while the process was exiting, without any effect.
        if status == -signal.SIGINT:
            self.how = "its process was interrupted"
        elif status == -signal.SIGTERM:
            self.how = "its process was terminated"
        return Result(Ended.FAILED, error=ProcessEnded(_end_text(status)))


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return os.curdir


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """A pickler that keeps the file names of functions, and can pickle types to which msgspec has attached a cache.

    The function of a typed task is pickled by reference, like other module-level functions. Without this class,
    cloudpickle would copy the function and its globals, because the name in the module refers to the `TaskFunction`.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how to pickle an object; see `pickle.Pickler.reducer_override`."""
        if isinstance(obj, CodeType):
            make, arguments = self.dispatch_table[CodeType](obj)
            # cloudpickle replaces the file name, but tracebacks need it.
            return make, tuple(obj.co_filename if each == "<dynamic-code>" else each for each in arguments)
        if isinstance(obj, (FunctionType, TaskFunction)):
            found = _global_of(obj)
            if isinstance(found, TaskFunction):
                if found is obj:
                    return vars(obj)["__qualname__"]
                within = _way_to(obj, found)
                if within:
                    return operator.attrgetter(within), (found,)
        if isinstance(obj, type):
            if "__msgspec_cache__" in vars(obj):
                # The cache cannot be pickled, and msgspec recreates it when needed.
                del obj.__msgspec_cache__  # type: ignore[attr-defined]  # as just seen
            if issubclass(obj, msgspec.Struct) and _global_of(obj) is not obj:
                raise pickle.PicklingError(
                    f"another process cannot import the Struct {obj.__qualname__}. "
                    "Move it to a module, or use a dataclass"
                )
        return super().reducer_override(obj)


def _global_of(obj: Any) -> Any:
    """Return the value of the object's qualified name in its module, or None if another process cannot import it."""
    module = obj.__module__
    by_value = cloudpickle.cloudpickle.list_registry_pickle_by_value()
    if module == "__main__" or any(f"{module}.".startswith(f"{each}.") for each in by_value):
        return None
    found: Any = sys.modules.get(module)
    for name in getattr(obj, "__qualname__", "").split("."):  # a task of a partial has none
        found = getattr(found, name, None)
    return found


def _way_to(obj: Any, found: Any) -> str:
    """Return the path of ``__wrapped__`` attributes from ``found`` to the object, or "" if no such path exists."""
    names = []
    while found is not obj:
        found = vars(found).get("__wrapped__")
        if not isinstance(found, (FunctionType, TaskFunction)):
            return ""
        names.append("__wrapped__")
    return ".".join(names)


def _pickle_call(handler: Handler, arguments: tuple[Any, ...]) -> bytes:
    data = io.BytesIO()
    try:
        _Pickler(data).dump((handler.function, handler.is_coroutine, arguments))
    except Exception as error:
        hint = (
            "Create connections, locks and similar objects inside the function."
            if isinstance(error, TypeError)
            else "Use only objects that cloudpickle can pickle, or choose another isolation."
        )
        raise InvalidHandler(
            f"{handler.name} cannot be sent to a process ({type(error).__name__}: {error}). {hint}"
        ) from error
    return data.getvalue()


def _end_text(status: int | None) -> str:
    if status is None:
        return "the handler's process and its supervisor have died"
    if status >= 0:
        return f"the handler's process exited with code {status} before the handler returned"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    hint = " (out of memory, or killed by another program)" if status == -signal.SIGKILL else ""
    return f"the handler's process was killed by signal {name}{hint}"


# -- exceptions of the handler's process -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RemoteError:
    """A description of an exception that was raised in the handler's process.

    Attributes:
        module: the module of the exception's class.
        name: the qualified name of the class.
        text: the exception as a string.
        notes: the notes that were added with ``add_note``.
        trace: the traceback.
        final: whether the exception is a `BadInput`. If so, retrying the task cannot help.
        data: the pickled class, arguments and attributes of the exception, or None if they cannot be pickled.
    """

    module: str
    name: str
    text: str
    notes: list[str]
    trace: str
    final: bool
    data: bytes | None


def stand_in(remote: RemoteError) -> Exception:
    """Return an exception with the name, text, notes and traceback of an exception from another process."""
    name = remote.name.replace("\0", "?").encode(errors="replace").decode()  # as `type` requires
    base = BadInput if remote.final else Exception
    error: Exception = type(name, (base,), {"__module__": remote.module, "__qualname__": remote.name})(remote.text)
    if remote.notes:
        error.__notes__ = remote.notes  # type: ignore[attr-defined]  # Python 3.10 prints no notes, but accepts them
    error.__cause__ = ProcessTraceback(remote.trace)
    return error


_late_imports: dict[tuple[str, str], threading.Thread] = {}
"""The threads in which rebuilding took too long, by module and name of the exception's class."""


async def rebuild(remote: RemoteError) -> BaseException:
    """Rebuild and return the handler's exception. If this is impossible or takes too long, return a stand-in."""
    kind = (remote.module, remote.name)
    if remote.data is None or (kind in _late_imports and _late_imports[kind].is_alive()):
        return stand_in(remote)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(error)

    def unpickle() -> None:
        error = _unpickle(remote)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, error)

    # Use a daemon thread, because a closing loop waits for its own threads.
    thread = threading.Thread(target=unpickle, name="nqnb-rebuild", daemon=True)
    thread.start()
    try:
        error = await asyncio.wait_for(done, REBUILD_TIMEOUT_SECONDS)
    except asyncio.TimeoutError:
        _late_imports[kind] = thread
        log.warning(
            "is_failure receives a stand-in for %s.%s: the worker could not import the class within %g s. "
            "The stand-in has the same name and text.",
            *(remote.module, remote.name, REBUILD_TIMEOUT_SECONDS),
        )
        return stand_in(remote)
    if error is None:
        return stand_in(remote)
    error.__cause__ = ProcessTraceback(remote.trace)
    return error


def _unpickle(remote: RemoteError) -> BaseException | None:
    try:
        kind, arguments, state = pickle.loads(remote.data or b"")  # noqa: S301  from our own process
    except BaseException:  # noqa: BLE001  the class may not exist here, and its module may raise anything
        return None
    # The parameters of an __init__ may differ from `args`, but some C classes need their __init__.
    for make in (kind.__new__, lambda kind, *arguments: kind(*arguments)):
        try:
            error: Any = make(kind, *arguments)
            error.__dict__.update(state)
            if isinstance(error, BaseException) and str(error)[: len(remote.text)] == remote.text:
                return error
        except BaseException:  # noqa: BLE001, S112  the class may raise anything
            continue
    return None
