"""Coroutines as state machines: replay them from their inputs, and recognise two that stand at the same position.

A coroutine cannot be copied, but it is deterministic: fed the same answers, it comes to the same position. Two
positions count as one state where the same code waits at the same instruction with equal local variables.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import types
from collections.abc import Callable, Coroutine, Hashable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import msgspec

from nqnb import errors

from .simulated_server import Call, Raised

_MOVING_VARIABLES = frozenset(("pause", "began"))
"""Variables that only decide how long a pause takes, which ends at once here, or how long retries go on."""
_AWAITABLES = (types.CoroutineType, types.AsyncGeneratorType, types.GeneratorType)
_STACK_ITERATORS: tuple[type[Any], ...] = tuple({type(iter(kind())) for kind in (list, tuple, set, dict)} | {enumerate})


functions_seen: set[tuple[str, str]] = set()
"""The coroutines that some process was waiting in, as the name of their file and their own."""


class Process(Protocol):
    """One instance of the code under test, ready to be fed."""

    coroutine: Coroutine[Any, Any, Any]

    def set_clock(self, clock: int) -> None:
        """Set the time that the process reads from now on."""

    def hear(self, event: Any) -> None:
        """Change the process's shared state from outside, between two of its steps."""

    def shared(self) -> Any:
        """Return the state that the process shares with others and that steers the code."""


class Input(NamedTuple):
    """What a process is fed: an answer to its call or an event, and the server's clock at that moment."""

    value: Any
    clock: int
    event: bool = False


class Position(NamedTuple):
    """Where a process stands: the call that it waits for, or how it ended. ``shared`` is as `Process.shared`."""

    call: Call | None
    ended: Hashable
    shared: Any


class Automaton:
    """All positions that the processes of one exploration come to, numbered.

    Args:
        start: makes the process of a specification.
    """

    def __init__(self, start: Callable[[Any], Process]) -> None:
        self._start = start
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[tuple[Any, tuple[Input, ...]]] = []
        self.positions: list[Position] = []
        self._steps: dict[tuple[int, Input], int] = {}
        self.replays = 0

    def begin(self, specification: Hashable, clock: int) -> int:
        """Return the position at which a new process waits for the answer to its first call."""
        return self._position(specification, (Input(None, clock),))

    def feed(self, position: int, value: Any, clock: int, *, event: bool = False) -> int:
        """Return the position that an answer or an event leads to."""
        step = (position, Input(value, clock, event))
        after = self._steps.get(step)
        if after is None:
            specification, history = self._histories[position]
            after = self._steps[step] = self._position(specification, (*history, step[1]))
        return after

    def _position(self, specification: Any, history: tuple[Input, ...]) -> int:
        self.replays += 1
        process = self._start(specification)
        call: Call | None = None
        ended: Hashable = None
        try:
            for given in history:
                process.set_clock(given.clock)
                if given.event:
                    process.hear(given.value)
                elif isinstance(given.value, Raised):
                    call = process.coroutine.throw(error_of(given.value))
                else:
                    call = process.coroutine.send(given.value)
        except StopIteration as stop:
            call, ended = None, ("returned", frozen(stop.value))
        except errors.NqnbError as error:
            call, ended = None, ("raised", type(error).__name__)
        shared = process.shared()
        place = frozen(process.coroutine) if call is not None else ended
        key = (specification, place, call, shared)
        if call is not None:
            _abandon(process.coroutine)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.positions)
            self.positions.append(Position(call, ended, shared))
            self._histories.append((specification, history))
        return number


def error_of(raised: Raised) -> errors.NqnbError:
    """Return the exception of an answer."""
    kind: Any = getattr(errors, raised.error)
    simple: tuple[Any, ...] = (f"simulated {raised.error}",)
    extra = {"RevisionConflict": (), "NoRoom": ("subject", 503, 10047, "insufficient resources")}
    error: errors.NqnbError = kind(*simple, *extra.get(raised.error, ()))
    return error


class _AbandonedError(BaseException):
    """Ends a coroutine that is not needed any more."""


def _abandon(coroutine: Coroutine[Any, Any, Any]) -> None:
    """End a coroutine from the innermost frame outwards, as a cancel does.

    `close` begins outside, and an asynchronous generator in which the coroutine waits then cannot be closed.
    """
    with contextlib.suppress(_AbandonedError, StopIteration):
        while True:
            coroutine.throw(_AbandonedError())


@contextlib.contextmanager
def standing_clock() -> Iterator[None]:
    """Let no time pass on this machine: a sleep ends at once."""

    async def sleep(seconds: float, result: object = None) -> None:
        return

    def monotonic() -> float:
        return 0.0

    with mock.patch.object(asyncio, "sleep", sleep), mock.patch("time.monotonic", monotonic):
        yield


def frozen(value: Any) -> Hashable:
    """Return what decides how a value behaves from now on, as a hashable value."""
    return _freeze(value, set())


def _freeze(value: Any, open_ones: set[int]) -> Hashable:
    kind = type(value)
    if kind not in _known_freezers:
        _known_freezers[kind] = _freezer_of(kind)
    freezer = _known_freezers[kind]
    if freezer is None:
        plain: Hashable = value
        return plain
    if id(value) in open_ones:
        return "the same again"
    open_ones.add(id(value))
    try:
        return freezer(value, open_ones)
    finally:
        open_ones.discard(id(value))


def _freezer_of(kind: type) -> Callable[[Any, set[int]], Hashable] | None:
    """Return what freezes values of a type; None where they are hashable as they are."""
    if kind in (type(None), int, str, bytes, float, bool) or issubclass(kind, enum.Enum):
        return None
    if issubclass(kind, msgspec.Struct) and kind.__module__ in ("nqnb.protocol.transition", "nqnb.protocol.finish"):
        # One of its fields may be an error or a function, which have no JSON form.
        return lambda value, open_ones: (
            kind.__qualname__,
            *(_freeze(getattr(value, name), open_ones) for name in kind.__struct_fields__),
        )
    for base, freezer in _FREEZERS.items():
        if issubclass(kind, base):
            return freezer
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return lambda value, open_ones: (
            kind.__qualname__,
            *(_freeze(getattr(value, name), open_ones) for name in names),
        )
    if kind.__module__.startswith("nqnb.protocol"):
        slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
        return lambda value, open_ones: (
            kind.__qualname__,
            _freeze_variables(
                {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {}), open_ones
            ),
        )
    return lambda value, open_ones: kind.__qualname__


def _freeze_many(value: Any, open_ones: set[int]) -> Hashable:
    return type(value).__qualname__, *[_freeze(part, open_ones) for part in value]


def _freeze_dict(value: Any, open_ones: set[int]) -> Hashable:
    return tuple([(_freeze(key, open_ones), _freeze(part, open_ones)) for key, part in value.items()])


def _freeze_variables(variables: dict[str, Any], open_ones: set[int]) -> Hashable:
    return tuple(
        [(name, _freeze(part, open_ones)) for name, part in variables.items() if name not in _MOVING_VARIABLES]
    )


def _freeze_function(value: Any, open_ones: set[int]) -> Hashable:
    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return value.__qualname__, *[_freeze(cell, open_ones) for cell in cells]


def _freeze_frame(waiting: Any, open_ones: set[int]) -> Hashable:
    """Return the position of a coroutine or generator: its instruction, its variables, and what its stack holds."""
    prefix = {types.CoroutineType: "cr", types.AsyncGeneratorType: "ag", types.GeneratorType: "gi"}[type(waiting)]
    frame = getattr(waiting, f"{prefix}_frame")
    code = getattr(waiting, f"{prefix}_code")
    functions_seen.add(_name_of(code))
    if frame is None:
        return code.co_qualname if hasattr(code, "co_qualname") else code.co_name, "ended"
    variables = frame.f_locals
    named = {id(part) for part in variables.values()}
    stack = [
        _freeze(part, open_ones)
        for part in _on_stack(waiting, frame)
        if id(part) not in named and isinstance(part, (*_AWAITABLES, *_STACK_ITERATORS))
    ]
    return code.co_name, frame.f_lasti, _freeze_variables(variables, open_ones), tuple(stack)


@cache
def _name_of(code: types.CodeType) -> tuple[str, str]:
    return Path(code.co_filename).stem, code.co_name


def _on_stack(waiting: Any, frame: types.FrameType) -> list[Any]:
    """Return what a suspended frame refers to; the generator behind an ``__anext__`` is one step further."""
    found: list[Any] = []
    # Python 3.10 keeps the stack in the frame, later versions in the coroutine itself.
    for part in (*gc.get_referents(waiting), *gc.get_referents(frame)):
        found.append(part)
        if type(part).__name__ in ("async_generator_asend", "coroutine_wrapper"):
            found += [inner for inner in gc.get_referents(part) if isinstance(inner, _AWAITABLES)]
    return found


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  an empty cell raises
    except ValueError:
        return False
    return True


_FREEZERS: dict[type, Callable[[Any, set[int]], Hashable]] = {
    msgspec.Struct: lambda value, _: (type(value).__qualname__, msgspec.json.encode(value)),
    msgspec.Raw: lambda value, _: bytes(value),
    tuple: _freeze_many,
    list: _freeze_many,
    dict: _freeze_dict,
    set: lambda value, open_ones: frozenset(_freeze(part, open_ones) for part in value),
    frozenset: lambda value, open_ones: frozenset(_freeze(part, open_ones) for part in value),
    BaseException: lambda value, _: (type(value).__qualname__, str(value)),
    types.FunctionType: _freeze_function,
    types.MethodType: lambda value, open_ones: (value.__func__.__qualname__, _freeze(value.__self__, open_ones)),
    type: lambda value, _: value.__qualname__,
    **dict.fromkeys(_AWAITABLES, _freeze_frame),
    **dict.fromkeys(_STACK_ITERATORS, lambda value, open_ones: _freeze_many(value.__reduce__()[1:], open_ones)),
}
"""By type: what freezes a value of the type. Everything else counts by the name of its type only."""
_known_freezers: dict[type, Callable[[Any, set[int]], Hashable] | None] = {}
