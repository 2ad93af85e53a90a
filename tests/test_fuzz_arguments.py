"""Every public callable, given whatever a caller may give: it works, or raises an error of nqnb's, and returns."""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from helpers.bad_values import fuzzed, nasty
from hypothesis import given
from hypothesis import strategies as st

import nqnb
from nqnb import frames
from nqnb.notebook.kernel_worker import Local
from nqnb.notebook.session import Session
from nqnb.notebook.tasks import SessionTask, TaskList
from nqnb.server import detached
from nqnb.widgets.table import TaskTable

INPUTS, FULL = 1_500, 60_000
MOST_SECONDS = 20.0
"""A call that takes longer hangs; the machine may be busy."""
MOST_CHARACTERS = 4_000
"""Of an error."""

NO_SURFACE = {
    "load_ipython_extension": "IPython calls it, with its shell",
    "unload_ipython_extension": "as above",
    "MemoryStore": "the engine calls a store, with keys and values that it has checked",
    "StateStore": "a protocol",
    "Entry": "what a store hands out",
    "Task": "a client makes it; its calls are here",
}
"""Public names that callers do not give arguments to, and why."""

INSIDE = {
    *("Session.call", "Session.call_within", "Session.wait_for_tasks", "Session.interrupt", "Session.abandon"),
    *("Session.say", "Session.close", "Local.close", "Local.serve"),
    *("Worker.info", "Worker.swap", "Client.submit_item"),
    *("TaskList.append", "TaskList.extend", "TaskList.insert"),
}
"""Methods that only nqnb's own parts call, and those of a list, which raise what every list raises."""

GOOD: dict[str, tuple[Any, ...]] = {
    "queue": ("fuzz", "fuzz", "missing"),
    "id": ("ended", "ended", "nobody"),
    "what": ("ended", ["ended", "nobody"]),
    "payload": ({"a": 1},),
    "payloads": ([1, 2],),
    "timeout": (0, 1),
    "wait": (0,),
    "since": ("10m",),
    "status": ("failed", 2),
    "older_than": (3600,),
    "function": (lambda job: None,),
    "retry": (1,),
    "errors": ("return",),
    "name": ("sweep-7",),
    "group": ("sweep-7",),
    "key": ("sweep/7", lambda payload: "sweep/7"),
    "if_exists": ("attach", "replace", "error"),
    "process_at": (timedelta(hours=1),),
}
"""What is right for the arguments of these names: behind the first check there are others."""

OPTIONS = [*(field.name for field in fields(nqnb.Settings) if field.init), "bogus"]


class World:
    """What the calls are made on: a real server, a client, a session."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.loop = asyncio.new_event_loop()
        self.client = nqnb.connect(url)
        self.run(self.client.open())
        self.keep_ended()
        self.session = nqnb.session(url)
        self.settings = nqnb.Settings(url)
        self.worker = nqnb.Worker(url)
        self.job = nqnb.Job("ended", "fuzz", b"", 1, 0, None, lambda: None)
        self.job.state.stop.set()  # so that `wait`, which may be given any time, returns at once
        self.backoff = nqnb.Backoff()
        self.server = nqnb.DevServer()
        self.tried: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.longest = 0
        """The length of the longest error."""

    def keep_ended(self) -> None:
        """See that the task ``ended`` exists and has ended. Its queue is deleted, so that its id is free at once."""
        with suppress(nqnb.TaskExists):
            self.run(self.client.submit("kept", id="ended"))
        self.run(self.client.cancel("ended"))
        with suppress(nqnb.UnknownQueue):
            self.run(self.client.delete_queue("kept", True))

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(call, MOST_SECONDS))

    def close(self) -> None:
        self.session.down()
        self.run(self.client.close())
        self.loop.close()

    def instance(self, kind: type) -> Any:
        if kind is Session and not self.session.open:  # `down` is one of the calls
            self.session = nqnb.session(self.url)
        made: dict[type, Any] = {
            nqnb.Client: self.client,
            nqnb.Task: self.client.task("ended"),
            nqnb.Worker: self.worker,
            nqnb.Job: self.job,
            nqnb.Backoff: self.backoff,
            nqnb.Settings: self.settings,
            nqnb.DevServer: self.server,
            Session: self.session,
            SessionTask: self.session.task("ended") if kind is SessionTask else None,
            TaskList: TaskList(self.session, [SessionTask(self.session, "ended", "fuzz")]),
            Local: self.session.local,
        }
        return made[kind] if kind in made else kind()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with nqnb.DevServer() as server, ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(detached, "start", lambda: pytest.fail("it starts a detached server"))
        world = World(server.url)
        stack.callback(world.close)
        yield world


Surface = tuple[str, Any, type | None]


def surfaces() -> list[Surface]:
    """Every callable that takes arguments, by introspection: its name, itself, the class whose method it is."""
    found: list[Surface] = []
    handles: list[type] = [nqnb.Task, Session, SessionTask, TaskList, Local]
    for name in nqnb.__all__:
        public = getattr(nqnb, name)
        record = inspect.isclass(public) and issubclass(public, (BaseException, msgspec.Struct, int))
        if not callable(public) or record or name in NO_SURFACE:
            continue
        found.append((name, public, None))
        if inspect.isclass(public):
            handles.append(public)
    found += [(f"frames.{name}", frame, None) for name, frame in vars(frames).items() if name.endswith("s_frame")]
    for kind in dict.fromkeys(handles):
        for name in dir(kind):
            member = inspect.getattr_static(kind, name)
            member = getattr(member, "__func__", member)
            ours = inspect.isfunction(member) and member.__module__.partition(".")[0] == "nqnb"
            if ours and not name.startswith("_") and f"{kind.__name__}.{name}" not in INSIDE:
                found.append((f"{kind.__name__}.{name}", member, kind))
    return [each for each in found if parameters(each)]


def parameters(surface: Surface) -> list[inspect.Parameter]:
    _, function, kind = surface
    given = list(inspect.signature(function).parameters.values())
    return given[1:] if kind is not None else given


SURFACES = surfaces()


def test_every_public_class_is_a_surface() -> None:
    named = {name for name, *_ in SURFACES}
    assert {"Client.submit", "Session.tasks", "Worker.handler", "Backoff", "connect", "frames.tasks_frame"} <= named
    assert {"Task.wait", "SessionTask.cancel", "TaskList.results", "Settings.of", "DevServer", "Local.stop"} <= named


Call = tuple[Surface, list[Any], dict[str, Any]]


def call_of(seed: int) -> Call:
    """A callable with its arguments: good ones, nasty ones, and some left out."""
    draw = random.Random(seed)
    surface = draw.choice(SURFACES)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for each in parameters(surface):
        if each.kind is each.VAR_KEYWORD:
            options = OPTIONS if surface[0] != "session" else ("name", "retention", "bogus")
            named.update({draw.choice(options): nasty(draw) for _ in range(draw.randrange(3))})
            continue
        if each.kind is each.VAR_POSITIONAL or (each.default is not each.empty and draw.random() < 0.5):
            continue
        value = draw.choice(GOOD[each.name]) if each.name in GOOD and draw.random() < 0.5 else nasty(draw)
        if each.kind is each.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[each.name] = value
    return surface, positional, named


class CallbackError(Exception):
    """A caller's own function raised."""


def fallible(function: Callable[..., object]) -> Callable[..., object]:
    """The same function, with its errors marked as the caller's."""

    @functools.wraps(function, assigned=(), updated=())
    def call(*arguments: object) -> object:
        try:
            return function(*arguments)
        except Exception as error:
            raise CallbackError from error

    return call


def attempt(world: World, surface: Surface, positional: list[Any], named: dict[str, Any]) -> None:
    name, function, kind = surface
    world.tried[name] += 1
    if name == "session":
        # Another address could be anybody's, and without one the user's own server is started.
        url = named.get("url")
        named["url"] = world.url if url is None or isinstance(url, str) else url
    target = function if kind is None else getattr(world.instance(kind), function.__name__)
    if callable(given := named.get("progress")):
        named["progress"] = fallible(given)
    try:
        result = target(*positional, **named)
        if inspect.iscoroutine(result):
            result = world.run(result)
        elif inspect.isasyncgen(result):
            try:
                world.run(anext(result, None))
            finally:
                world.run(result.aclose())
        elif inspect.isgenerator(result):
            try:
                next(result, None)
            finally:
                result.close()
        if name.endswith(".handler") and callable(result) and name.startswith("Worker"):
            result(named.get("backoff", len))
        tidy(world, result)
        if name.endswith(".prune"):
            world.keep_ended()
    except nqnb.JobCancelled:
        assert kind is nqnb.Job
    except CallbackError:
        pass  # what a caller's own function raises reaches the caller
    except nqnb.NqnbError as error:
        world.refused[name] += 1
        world.longest = max(world.longest, len(str(error)))


def tidy(world: World, result: Any) -> None:
    """End what was made, so that no later call waits for it."""
    for each in result if isinstance(result, list) else [result]:
        if isinstance(each, nqnb.Task):
            with suppress(nqnb.NqnbError):  # "nobody", which has no task
                world.run(each.cancel())
        elif isinstance(each, SessionTask):
            with suppress(nqnb.NqnbError):
                each.cancel()
        elif isinstance(each, TaskTable):
            each.close()
        elif isinstance(each, Session) and each is not world.session:
            each.down()


@pytest.mark.timeout(3600)  # for --full
def test_no_argument_raises_anything_but_an_error_of_nqnb(world: World, request: pytest.FixtureRequest) -> None:
    whole = request.config.getoption("--full")

    @fuzzed(INPUTS, FULL, whole=whole)
    @given(st.integers(0, 2**64 - 1))
    def fuzz(seed: int) -> None:
        surface, positional, named = call_of(seed)
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            attempt(world, surface, positional, named)

    fuzz()
    total = sum(world.tried.values())
    print(
        f"{total:,} calls of {len(world.tried)} of {len(SURFACES)} callables, {sum(world.refused.values()):,} refused, "
        f"the longest error has {world.longest:,} characters"
    )
    assert total >= (FULL if whole else INPUTS)
    assert len(world.tried) > len(SURFACES) * 0.9
    assert world.longest < MOST_CHARACTERS
    # The client and the session still work; what `prune` was given may have removed every ended task.
    task = world.run(world.client.submit("fuzz"))
    assert world.instance(Session).status(task.id) is nqnb.Status.PENDING
