"""Handlers that take only the payload, and handlers that return bytes, wherever they run."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from typing import Any

import pytest

import nqnb
from nqnb.frames import tasks_frame
from nqnb.protocol.wire import TaskMessage
from nqnb.text import plain
from nqnb.worker.handlers import Isolation, PayloadFunction, make_handler

pytestmark = pytest.mark.anyio

PLACES: list[Isolation] = ["coroutine", "thread", "process"]
SIZES = [0, 300, 20_000]
"""Numbers of bytes: none, as many as fit into an entry, and more."""


@dataclass
class Point:
    """An annotated payload."""

    x: int


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Isolation:
    """Return each place where a handler can run."""
    place: Isolation = request.param
    return place


def at(worker: nqnb.Worker, queue: str, place: Isolation, function: Any) -> None:
    """Register a plain function, or a coroutine that calls the function, as the place needs it."""
    if place == "coroutine":

        async def coroutine(payload: Any) -> Any:
            return function(payload)

        worker.handler(queue)(coroutine)
    else:
        worker.handler(queue, isolation=place)(function)


async def test_a_handler_of_the_payload_alone_runs(nq: nqnb.Client, settings: nqnb.Settings, place: Isolation) -> None:
    worker = nqnb.Worker(settings)
    at(worker, "one", place, lambda payload: payload["a"] + 1)
    async with worker:
        assert await (await nq.submit("one", {"a": 4})).result(30) == 5


async def test_the_traceback_of_such_a_handler_has_only_its_frames(
    nq: nqnb.Client, settings: nqnb.Settings, place: Isolation
) -> None:
    worker = nqnb.Worker(settings)
    at(worker, "one", place, lambda payload: 1 / payload)
    async with worker:
        with pytest.raises(nqnb.TaskFailed) as caught:
            await (await nq.submit("one", 0)).result(30)
    trace = caught.value.traceback or ""
    assert "<lambda>" in trace
    assert f"nqnb{os.sep}worker" not in trace.replace(__file__, "")


def by_annotation(point: Point) -> int:
    return point.x


def by_string(point: dict[str, int]) -> int:
    return point["x"]


def by_name(payload) -> int:  # type: ignore[no-untyped-def]  # without an annotation, as in a notebook
    return int(payload["x"])


def by_name_with_a_default(payload: Any, factor: int = 1) -> int:
    return int(payload["x"]) * factor


async def job_by_annotation(payload: nqnb.Job) -> None: ...


def job_by_union(x: nqnb.Job | None) -> None: ...


def job_by_name(job: dict[str, int]) -> None: ...


def job_of_a_missing_type(j: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821  as under TYPE_CHECKING


def neither(x) -> None: ...  # type: ignore[no-untyped-def]  # it has neither an annotation nor a telling name


@pytest.mark.parametrize("function", [by_annotation, by_string, by_name, by_name_with_a_default])
def test_the_only_argument_is_the_payload_by_its_annotation_or_name(function: Any) -> None:
    handler = make_handler("q", function)
    assert isinstance(handler.function, PayloadFunction)
    assert handler.name == function.__qualname__
    job = nqnb.Job("a", "q", b'{"x":7}', 1, 0, None, lambda: None)
    assert handler.call(job)() == 7


@pytest.mark.parametrize(
    "function", [job_by_annotation, job_by_union, job_by_name, job_of_a_missing_type, neither, lambda job: None]
)
def test_the_only_argument_is_the_job_otherwise(function: Any) -> None:
    assert not make_handler("q", function).takes_payload


async def test_a_job_that_is_used_as_the_payload_fails_with_a_hint(
    nq: nqnb.Client, settings: nqnb.Settings, place: Isolation
) -> None:
    worker = nqnb.Worker(settings)
    if place == "coroutine":

        @worker.handler("one")
        async def one(item) -> Any:  # type: ignore[no-untyped-def]  # as in a notebook
            return item["a"]

    else:

        @worker.handler("one", isolation=place)
        def two(item) -> Any:  # type: ignore[no-untyped-def]  # as in a notebook
            return item["a"]

    async with worker:
        task = await nq.submit("one", {"a": 4})
        with pytest.raises(nqnb.TaskFailed) as caught:
            await task.result(30)
    assert str(caught.value).endswith(
        "TypeError: 'Job' object is not subscriptable. The handler's only argument receives the Job: "
        "take (job, payload), or name the argument `payload`"
    )


@pytest.mark.parametrize("size", SIZES)
async def test_bytes_come_back_as_bytes(nq: nqnb.Client, settings: nqnb.Settings, place: Isolation, size: int) -> None:
    worker = nqnb.Worker(settings)
    at(worker, "one", place, lambda payload: (bytes(range(256)) * 100)[:payload])
    async with worker:
        task = await nq.submit("one", size)
        expected = (bytes(range(256)) * 100)[:size]
        assert await task.result(30) == expected
    (info,) = await nq.tasks("one")
    assert info.result_is_bytes
    assert bool(info.result_key) == (size > 4096)
    if not info.result_key:
        assert info.result == expected
        assert tasks_frame([info]).result.iloc[0] == expected


@pytest.mark.parametrize("kind", [bytearray, memoryview])
async def test_other_kinds_of_bytes_do_too(nq: nqnb.Client, settings: nqnb.Settings, kind: Any) -> None:
    worker = nqnb.Worker(settings)
    at(worker, "one", "thread", lambda payload: kind(b"\xff1"))
    async with worker:
        assert await (await nq.submit("one", 1)).result(30) == b"\xff1"


async def test_bytes_within_a_result_are_base64_still(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)
    at(worker, "one", "thread", lambda payload: {"a": b"\xff"})
    async with worker:
        task = await nq.submit("one", 1)
        assert await task.result(30) == {"a": "/w=="}
        assert not (await task.fetch()).result_is_bytes


def test_a_result_that_another_program_marked_falsely_is_kept_as_it_is() -> None:
    entry = json.dumps({"ID": "a", "Queue": "q", "Status": 3, "Meta": {"result": {"b": 1}, "result_is_bytes": True}})
    message = TaskMessage.of_entry("a", entry.encode())
    info = nqnb.TaskInfo.of(message, 1)
    assert info.result == b'{"b": 1}'


def test_bytes_are_base64_in_the_json_of_the_shell() -> None:
    assert plain(b"\xff\x00") == base64.b64encode(b"\xff\x00").decode()
