"""Tasks with types: what runs on a server, and what mypy refuses.

The lines with ``type: ignore`` are wrong on purpose: mypy fails if it accepts one of them.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import nqnb
import nqnb.testing
from nqnb.notebook.tasks import SessionTask

if TYPE_CHECKING:
    from typing_extensions import assert_type

pytestmark = pytest.mark.anyio


@dataclass
class Resize:
    path: str
    width: int = 800


@dataclass
class Image:
    path: str
    made_at: datetime


@dataclass
class Scale:
    path: Path
    factor: np.float64


def scale(job: nqnb.Job, payload: Scale) -> Scale:
    return Scale(payload.path.with_suffix(".png.scaled"), payload.factor * 2)


def resize(job: nqnb.Job, payload: Resize) -> Image:
    return Image(f"{payload.path}@{payload.width}", datetime(2026, 11, 29, tzinfo=timezone.utc))


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_a_result_has_the_annotated_type(nq: nqnb.Client, settings: nqnb.Settings, isolation: str) -> None:
    worker = nqnb.Worker(settings)
    task = worker.task("resize", isolation=isolation)(resize)
    async with worker:
        submitted = await task.submit(nq, Resize("a.png"), retry=1)
        image = await submitted
        if TYPE_CHECKING:
            assert_type(image, Image)
            assert_type(await submitted.result(30), Image)
        assert image == await submitted.result(30) == Image("a.png@800", datetime(2026, 11, 29, tzinfo=timezone.utc))
        assert (await submitted.status()).label == "completed"
    assert task(nqnb.testing.job(), Resize("b.png", 5)).path == "b.png@5"
    assert repr(task) == "<task resize of queue resize>"


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_paths_and_numpy_values_keep_their_types(
    nq: nqnb.Client, settings: nqnb.Settings, isolation: str
) -> None:
    worker = nqnb.Worker(settings)
    task = worker.task("scale", isolation=isolation)(scale)
    async with worker:
        scaled = await (await task.submit(nq, Scale(Path("a.png"), np.float64(2.5)))).result(30)
    assert scaled == Scale(Path("a.png.scaled"), np.float64(5.0))
    assert (type(scaled.factor), type(scaled.path)) == (np.float64, type(Path("a")))


async def test_payloads_of_other_types_are_refused_by_mypy_and_by_the_worker(
    nq: nqnb.Client, settings: nqnb.Settings
) -> None:
    worker = nqnb.Worker(settings)

    @worker.task("double")
    async def double(payload: int) -> int:
        return 2 * payload

    direct = double(4)
    if TYPE_CHECKING:
        _ = assert_type(direct, Coroutine[Any, Any, int])
    assert await direct == 8
    async with worker:
        assert await (await double.submit(nq, 21)) == 42
        wrong = await double.submit(nq, "x")  # type: ignore[call-overload]  # that is what is tested
        with pytest.raises(nqnb.TaskFailed, match="does not match the annotation"):
            await wrong
    with pytest.raises(TypeError):
        await double("x", 1)  # type: ignore[call-arg,arg-type]  # that is what is tested


async def test_a_result_of_another_type_is_reported(nq: nqnb.Client, settings: nqnb.Settings) -> None:
    worker = nqnb.Worker(settings)

    @worker.task("count")
    def count(payload: str) -> int:
        return "many"  # type: ignore[return-value]  # an older version of the function did so

    async with worker:
        task = await count.submit(nq, "a")
        with pytest.raises(
            nqnb.MalformedMessage, match=r"the result of task '\w+' does not match .*got `str`"
        ) as caught:
            await task
        assert caught.value.data == b'"many"'
        assert await nq.result(task.id) == "many"


async def test_a_queue_without_a_name_is_refused() -> None:
    worker = nqnb.Worker()
    with pytest.raises(nqnb.InvalidHandler, match=r'Write @worker.task\("QUEUE"\)'):
        worker.task(resize)  # type: ignore[arg-type]  # that is what is tested


async def test_a_session_submits_without_await(server: nqnb.DevServer) -> None:
    worker = nqnb.Worker(server.url)

    @worker.task("double")
    def double(payload: int) -> int:
        return 2 * payload

    def submit() -> Any:
        with nqnb.session(server.url) as session:
            task = double.submit(session, 21, retry=1)
            if TYPE_CHECKING:
                _ = assert_type(task, SessionTask)
            return task.result(30)

    async with worker:
        assert await asyncio.to_thread(submit) == 42


def test_the_attributes_of_a_function_do_not_change_the_queue() -> None:
    worker = nqnb.Worker()

    def resize(payload: str) -> str:
        return payload

    resize.queue = "of another library"  # type: ignore[attr-defined]  # other libraries set such attributes
    low = worker.task("low")(resize)
    high = worker.task("high")(low)
    assert (low.queue, high.queue, high("a.png")) == ("low", "high", "a.png")
    assert "of queue high>" in repr(high)


MODULE = """
import threading
import nqnb

worker = nqnb.Worker()
LOCK = threading.Lock()
calls = []


@worker.task("one", isolation="process", reuse=10)
def one(payload: None) -> int:
    with LOCK:
        calls.append(payload)
    return len(calls)


@worker.task("high", isolation="process", reuse=10)
@worker.task("low", isolation="process", reuse=10)
def stacked(job: nqnb.Job, payload: None) -> int:
    with LOCK:
        calls.append(payload)
    return len(calls)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module that defines a worker, its tasks, and a lock, which cannot be pickled."""
    (tmp_path / "jobs_with_a_lock.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("jobs_with_a_lock")
    del sys.modules["jobs_with_a_lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="a handler cannot run in a process")
@pytest.mark.parametrize("queue", ["one", "low", "high"])
async def test_the_tasks_of_a_process_share_the_module_of_a_typed_task(
    nq: nqnb.Client, settings: nqnb.Settings, jobs: Any, queue: str
) -> None:
    worker = nqnb.Worker(settings, concurrency=1)
    worker.handlers.update(jobs.worker.handlers)
    async with worker:
        assert [await (await nq.submit(queue)).result(30) for _ in range(3)] == [1, 2, 3]
