"""What is written beside a payload near the server's limit fits: it is measured as it goes over the wire."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from helpers.history import assert_queues_empty

import nqnb
from nqnb import Status
from nqnb.protocol.names import CLIENT_HEADER
from nqnb.protocol.submit import META_RESERVE, make_message
from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Progress, Source, TaskMessage, as_go
from nqnb.worker.outcome import INLINE_RESULT

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024
HTML = "<p>" * 1300
"""3.9 kB, which Go's escaping makes 16.9 kB."""


@pytest.fixture(scope="module")
def server() -> Iterator[nqnb.DevServer]:
    """One server for all that is here."""
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    """An open client of it; whatever the test has stored is removed."""
    async with nqnb.connect(settings) as client:
        yield client
        connection = client.backend.connection
        for name in (await connection.api("STREAM.NAMES"))["streams"]:
            await connection.api(f"STREAM.DELETE.{name}")


def largest_payload() -> bytes:
    """The largest that a submit takes."""
    size = (MEGABYTE - META_RESERVE) * 3 // 4
    message = make_message("work", bytes(size))
    message.Meta = Meta(client="c" * 60, submitted_at=1795921528.66854)
    return bytes(size - (len(message.encode()) + META_RESERVE - MEGABYTE + 20) * 3 // 4)


async def run(
    nq: nqnb.Client, settings: nqnb.Settings, function: Callable[..., Any], payload: bytes, **options: Any
) -> nqnb.TaskInfo:
    """What becomes of one task that a worker runs with a function, in one run."""
    runs: list[str] = []

    def work(job: nqnb.Job) -> Any:
        runs.append(job.id)
        return function(job)

    worker = nqnb.Worker(settings)
    worker.handler("work", backoff=nqnb.Backoff(0, 0))(work)
    async with worker:
        task = await nq.submit("work", payload, **options)
        await task.wait(timeout=20)
        await assert_queues_empty(nq, "work")
        assert len(runs) == 1
        return await task.fetch()


@pytest.mark.parametrize(
    "result", [HTML, "\u2028" * 1300, "&" * 4000, "é" * 2000, "x" * 3900], ids=["html", "lines", "and", "é", "x"]
)
async def test_a_result_that_escaping_makes_long_completes_in_one_attempt(
    nq: nqnb.Client, settings: nqnb.Settings, result: str
) -> None:
    info = await run(nq, settings, lambda job: result, largest_payload(), retry=3)
    assert (info.status, info.attempt) == (Status.COMPLETED, 1)
    escaped = len(as_go(msgspec.json.encode(result)))
    assert bool(info.result_key) == (escaped > INLINE_RESULT)
    assert await nq.result(info.id) == result


async def test_logs_progress_and_an_error_that_escaping_makes_long(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    def work(job: nqnb.Job) -> None:
        for _ in range(30):
            job.log("<" * 300)
        job.progress(1, 2, "&" * 300)
        raise type("<" * 5000, (ValueError,), {})(HTML * 10)

    info = await run(nq, settings, work, largest_payload())
    assert info.status is Status.FAILED
    assert info.error is not None
    assert info.error.message.startswith("<p><p>")


async def test_a_deep_result_does_not_hide_its_task(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    deep: list[Any] = []
    for _ in range(850):
        deep = [deep]
    info = await run(nq, settings, lambda job: deep, b"1")
    assert info.status is Status.COMPLETED
    assert info.result_key


ROOM = MEGABYTE - 100
"""Bytes that a message of another client has, within the server's limit and without room for a state beside it."""


def filled(**fields: Any) -> TaskMessage:
    return TaskMessage(ID="full", Queue="work", **fields)


BRIMFUL = {
    "escaped": lambda size: filled(StreamName="<" * (size // 6)),
    "stream": lambda size: filled(StreamName="s" * size),
    "client": lambda size: filled(Meta=Meta(client="c" * size)),
    "log": lambda size: filled(Meta=Meta(log=["l" * (size // 100 - 3)] * 100)),
    "result": lambda size: filled(Meta=Meta(result=msgspec.Raw(b'"' + b"r" * (size - 2) + b'"'))),
    "error": lambda size: filled(Meta=Meta(error=ErrorInfo("e" * (size // 2), "m" * (size // 2)))),
    "time": lambda size: filled(ProcessAt="p" * size),
    "payload": lambda size: filled(Payload=bytes(size * 3 // 4)),
}


@pytest.mark.parametrize("fill", BRIMFUL.values(), ids=BRIMFUL)
@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_another_client_has_filled_to_the_brim_ends(
    nq: nqnb.Client, settings: nqnb.Settings, fill: Callable[[int], TaskMessage], cancelled: bool
) -> None:
    message = fill(ROOM - len(fill(1200).encode()) + 1200)
    assert MEGABYTE - 400 < len(message.encode()) < MEGABYTE - 60
    await nq.backend.ensure_queue("work")
    ack = await nq.backend.connection.publish("work.task", message.encode(), {CLIENT_HEADER: "task"})
    message.Sequence = ack.sequence
    if cancelled:
        assert (await nq.purge_queue("work")).deleted == 1
        assert await nq.status("full") is Status.DELETED
        return
    worker = nqnb.Worker(settings)
    worker.handler("work")(lambda job: "done")
    async with worker:
        await assert_queues_empty(nq, "work", within=20)
    assert await nq.result("full", 1) == "done"


async def test_a_cancel_of_what_runs_near_the_limit(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    started = threading.Event()
    worker = nqnb.Worker(settings)

    @worker.handler("work")
    def work(job: nqnb.Job) -> None:
        for _ in range(30):
            job.log("<" * 300)
        started.set()
        job.wait(20)

    async with worker:
        task = await nq.submit("work", largest_payload())
        assert await asyncio.to_thread(started.wait, 10)
        assert (await task.cancel(wait=30)).status is Status.CANCELLED


def test_a_lean_task_is_small_whatever_it_had() -> None:
    long = "<" * 100_000
    full = TaskMessage(
        ID="a",
        Queue="q",
        StreamName=long,
        Payload=bytes(1000),
        ProcessAt=long,
        Meta=Meta(
            client=long,
            worker=long,
            origin=long,
            source=Source(long, 7, long, long),
            key=long,
            group=long,
            label=msgspec.Raw(msgspec.json.encode(long)),
            result_key=long,
            log=[long],
            error=ErrorInfo(long, long, long),
            cancel=CancelRecord(by=long, worker=long, how=long),
            progress=Progress(1, 2, long),
        ),
    )
    assert len(full.lean().encode()) < META_RESERVE
    assert full.lean().meta.error == ErrorInfo("<" * 200, "<" * 200)
