"""Task logs: what handlers print and log is stored, limited, followed and shown."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.command_line import Answer, Start, ended, start
from helpers.waiting import until_async

import nqnb
from nqnb.jetstream.log_stream import LogPart
from nqnb.worker import task_logs
from nqnb.worker.print_capture import Router

__all__ = ["start"]  # the fixture

pytestmark = pytest.mark.anyio
posix = pytest.mark.skipif(sys.platform == "win32", reason="processes need POSIX")
KINDS = ["coroutine", "thread", pytest.param("process", marks=[posix, pytest.mark.full])]


async def text_of(task: nqnb.client.Task) -> list[str]:
    return [line.text async for line in task.logs()]


def say(job: nqnb.Job) -> None:
    print("one")
    print("  two\nthree", file=sys.stderr)
    logging.getLogger("jobs").warning("four %s", "\x1b[2J")
    job.log("five")
    print("six", end="")


@pytest.mark.parametrize("kind", KINDS)
async def test_prints_and_records_are_stored_before_the_outcome(
    nq: nqnb.Client, settings: nqnb.Settings, kind: Any
) -> None:
    worker = nqnb.Worker(settings, task_logs=True)
    streams = sys.stdout, sys.stderr, list(logging.getLogger().handlers)

    async def resize(job: nqnb.Job) -> None:
        say(job)

    worker.handler("resize", **({} if kind == "coroutine" else {"isolation": kind}))(
        resize if kind == "coroutine" else say
    )
    async with worker:
        task, silent = await nq.submit("resize"), nq.task("missing")
        await task.wait(20)
        lines = [line async for line in task.logs()]
        expected = ["one", "  two", "three", "WARNING jobs: four \x1b[2J", "five", "six"]
        assert sorted(line.text for line in lines) == sorted(expected)
        if kind != "process":  # two pipes have no order
            assert [line.text for line in lines] == expected
        assert {(line.attempt, line.worker, line.missing) for line in lines} == {(1, worker.id, 0)}
        assert all(line.at is not None and abs(line.at.timestamp() - time.time()) < 60 for line in lines)
        with pytest.raises(nqnb.UnknownTask):
            await text_of(silent)
        assert [each.name for each in await nq.queues()] == ["resize"]
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == streams


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """Return the root logger without handlers, and restore its handlers after the test."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    yield root
    root.handlers = handlers


async def test_a_handler_that_configures_logging_does_not_end_the_capture_of_records(
    nq: nqnb.Client, settings: nqnb.Settings, root_logger: logging.Logger
) -> None:
    worker = nqnb.Worker(settings, task_logs=True)

    @worker.handler("configure")
    async def configure(job: nqnb.Job) -> None:
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)

    @worker.handler("report")
    async def report(job: nqnb.Job) -> None:
        logging.getLogger("jobs").warning("ready")

    async with worker:
        await (await nq.submit("configure")).wait(30)
        task = await nq.submit("report")
        await task.wait(30)
        assert await text_of(task) == ["WARNING jobs: ready"]
    assert [type(each) for each in root_logger.handlers] == [logging.NullHandler]


async def test_the_log_of_an_earlier_task_with_the_same_id_is_left_out(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, task_logs=True)

    async def report(job: nqnb.Job) -> None:
        if job.queue != "silent":
            print(job.queue)

    async def is_pruned() -> bool:
        return (await nq.prune(0)).entries == 1

    queues = ("monday", "tuesday", "silent")
    for queue in queues:
        worker.handler(queue)(report)
    async with worker:
        for queue in queues:
            task = await nq.submit(queue, id="report")
            assert await task.wait(20) is nqnb.Status.COMPLETED
            expected = [] if queue == "silent" else [queue]
            assert await text_of(task) == expected
            assert [line.text async for line in task.logs(follow=True)] == expected
            await until_async(is_pruned)


async def test_without_the_option_only_the_short_log_is_stored(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("resize")
    async def resize(job: nqnb.Job) -> None:
        assert not isinstance(sys.stdout, Router)
        say(job)

    async with worker:
        task = await nq.submit("resize")
        assert await task.wait(20) is nqnb.Status.COMPLETED
        (line,) = await text_of(task)
        assert line.endswith(" five")
    assert await nq.backend.connection.find("STREAM.INFO.nq-logs") is None


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
async def test_a_flood_is_limited_and_its_end_is_kept(nq: nqnb.Client, settings: nqnb.Settings, kind: Any) -> None:
    worker = nqnb.Worker(settings, task_logs=True)

    async def flood(job: nqnb.Job) -> None:
        flooded(job)

    def flooded(job: nqnb.Job) -> None:
        for number in range(20_000):
            print(number)

    worker.handler("resize", **({} if kind == "coroutine" else {"isolation": kind}))(
        flood if kind == "coroutine" else flooded
    )
    async with worker:
        task = await nq.submit("resize")
        await task.wait(30)
        lines = [line async for line in task.logs()]
    assert lines[-1].text == "19999"
    assert sum(1 + line.missing for line in lines) == 20_000
    assert 0 < len(lines) < 10_000
    info = await task.fetch()
    assert len(info.log) == 20


async def test_a_steady_log_is_complete_after_the_writes_have_become_slow(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_logs, "FAST_PARTS", 1)
    worker = nqnb.Worker(settings, task_logs=True)

    @worker.handler("resize")
    async def resize(job: nqnb.Job) -> None:
        print("the first part")
        await asyncio.sleep(0.6)
        for number in range(800):
            print(number)
        job.log("\n".join(["x" * 1_500] * 3))

    async with worker:
        task = await nq.submit("resize")
        await task.wait(30)
        lines = [line async for line in task.logs()]
    assert sum(line.missing for line in lines) == 0
    assert [len(line.text) for line in lines[-3:]] == [1_500] * 3
    assert len(lines) == 804


@pytest.mark.full
async def test_long_lines_and_many_parts_are_limited(
    nq: nqnb.Client, settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_logs, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(task_logs, "FAST_PARTS", 10_000)
    worker = nqnb.Worker(settings, task_logs=True)

    @worker.handler("resize")
    async def resize(job: nqnb.Job) -> None:
        print("x" * 10_000)
        for number in range(150):
            print(number)
            await asyncio.sleep(0.03)
        print("y" * 1_000 + "\n", *(["z" * 1_900 + "\n"] * 100), sep="")

    async with worker:
        task = await nq.submit("resize")
        await task.wait(30)
        lines = [line async for line in task.logs()]
    assert lines[0].missing > 10, "the server keeps 128 parts"
    assert max(len(line.text) for line in lines) == 1_900
    last = [line for line in lines if line.text.startswith("z")]
    assert sum(len(line.text) for line in last) <= task_logs.MAX_PART_CHARACTERS
    assert last[0].missing > 50


@pytest.mark.full
async def test_a_log_is_followed_over_a_retry_until_the_task_has_ended(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings, task_logs=True)
    go_on = asyncio.Event()

    @worker.handler("resize", backoff=nqnb.Backoff(0.05, 0.05))
    async def resize(job: nqnb.Job) -> None:
        print("attempt", job.attempt)
        if job.attempt == 1:
            raise ValueError
        await go_on.wait()
        print("end")

    async with worker:
        task = await nq.submit("resize", retry=1)
        found: list[nqnb.LogLine] = []

        async def follow() -> None:
            async for line in task.logs(follow=True):
                found.append(line)

        following = asyncio.ensure_future(follow())
        await until_async(lambda: len(found) == 2)
        assert not following.done()
        go_on.set()
        await asyncio.wait_for(following, 30)
    assert [(line.attempt, line.number, line.missing, line.text) for line in found] == [
        (1, 1, 0, "attempt 1"),
        (2, 1, 0, "attempt 2"),
        (2, 2, 0, "end"),
    ]


@pytest.mark.full
async def test_a_cancelled_handler_that_prints_without_end_is_stopped(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings, task_logs=True)

    @worker.handler("resize", grace=0.1)
    def resize(job: nqnb.Job) -> None:
        while True:
            print("again")

    @worker.handler("encode", grace=0.1)
    def encode(job: nqnb.Job) -> None:
        while True:
            logging.getLogger("jobs").warning("again")

    async with worker:
        tasks = [await nq.submit("resize"), await nq.submit("encode")]
        for task in tasks:
            await until_async(lambda: text_of(task))  # noqa: B023  it is called at once
            receipt = await task.cancel(10)
            assert receipt.status is nqnb.Status.CANCELLED
            assert "again" in (await text_of(task))[-1]


@pytest.mark.full
async def test_parts_that_other_programs_wrote_are_skipped_or_escaped(
    nq: nqnb.Client, settings: nqnb.Settings, start: Start
) -> None:
    task = await nq.submit("resize")
    await nq.backend.ensure_log_stream()
    for data in (b"", b"{", b'{"lines": 7}', b'{"lines": [[1, 2, 3]]}'):
        await nq.backend.connection.publish(f"$NQNB.logs.{task.id}", data)
    part = LogPart(attempt=2, lines=[(5, 1e300, "\x1b[2Jevil\u202e"), (6, 1.0, "[red]last")])
    await nq.backend.store_log(task.id, part)

    def shown(*options: str) -> Answer:
        return ended(start("-u", settings.urls[0], "task", "logs", task.id, *options))

    answer = await asyncio.to_thread(shown)
    first, second, third = answer.out.splitlines()
    assert first == "(4 lines not stored)"
    assert second == "\\x1b[2Jevil\\u202e"
    assert third.endswith("attempt 2: [red]last")
    assert [each["number"] for each in (await asyncio.to_thread(shown, "--json")).json] == [5, 6]


@pytest.mark.full
async def test_the_command_of_a_worker_stores_logs_in_each_process(
    nq: nqnb.Client, settings: nqnb.Settings, start: Start, tmp_path: Any
) -> None:
    (tmp_path / "jobs.py").write_text(
        "import logging, nqnb\nworker = nqnb.Worker()\n\n"
        "@worker.handler('resize', isolation='process')\ndef resize(job):\n"
        "    print('printed')\n    logging.info('logged')\n    import subprocess\n"
        "    subprocess.run(['echo', 'echoed'])\n"
    )
    process = start("-u", settings.urls[0], "worker", "jobs:worker", "--task-logs", "--processes", "2", cwd=tmp_path)
    task = await nq.submit("resize")
    assert await task.wait(30) is nqnb.Status.COMPLETED
    assert sorted(await text_of(task)) == ["INFO root: logged", "echoed", "printed"]
    process.terminate()
    assert process.wait(20) == 0
