"""Exceptions of a handler's process: rebuilt in the worker only for `is_failure`, and never on its loop."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.protocol.lifecycle import Ended
from nqnb.worker.executors import make_executor, process
from nqnb.worker.executors.executor import Result
from nqnb.worker.handlers import make_handler
from nqnb.worker.job import Job

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups, so no such handlers"),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose import is quick only in the handler's process. Elsewhere it waits for a file, at most 20 s."""
    name = f"slow_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        f"""
import os, time

if os.getpid() == {os.getpid()}:
    begun = time.monotonic()
    open({str(tmp_path / "begun")!r}, "w").close()
    while time.monotonic() - begun < (20 if {name!r} not in os.environ else 60):
        if os.path.exists({str(tmp_path / "go on")!r}):
            break
        time.sleep(0.01)

class Slow(Exception):
    pass
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def raises(module: str) -> Callable[[Job], None]:
    def handle(job: Job) -> None:
        raise __import__(module).Slow("what?")

    return handle


def runs(
    module: str, is_failure: Callable[[Exception], bool] | None, *, attempt: int = 1
) -> tuple[Any, asyncio.Task[Result]]:
    handler = make_handler("q", raises(module), isolation="process", is_failure=is_failure)
    executor = make_executor(handler, Job("a", "q", b"null", attempt, 1, None, lambda: None))
    return executor, asyncio.ensure_future(executor.run())


def is_being_imported(module: str) -> bool:
    return module in sys.modules and not hasattr(sys.modules[module], "Slow")


async def test_without_is_failure_nothing_is_imported(module: str) -> None:
    _, running = runs(module, None)
    result = await running
    assert (type(result.error).__qualname__, str(result.error)) == ("Slow", "what?")
    assert module not in sys.modules


async def test_without_a_retry_left_nothing_is_imported(module: str) -> None:
    _, running = runs(module, lambda error: True, attempt=2)
    assert type((await running).error).__qualname__ == "Slow"
    assert module not in sys.modules


async def test_a_slow_import_does_not_block_the_loop(module: str, tmp_path: Path) -> None:
    _, running = runs(module, lambda error: True)
    await until_async((tmp_path / "begun").exists)
    assert is_being_imported(module), "the loop ran only after the import"
    (tmp_path / "go on").touch()
    assert isinstance((await running).error, sys.modules[module].Slow)


async def test_an_import_that_never_ends_is_waited_for_once(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(module, "never")
    monkeypatch.setattr(process, "REBUILD_TIMEOUT_SECONDS", 0.3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, running = runs(module, lambda error: True)
            error = (await asyncio.wait_for(running, 50)).error
            assert (type(error).__qualname__, str(error)) == ("Slow", "what?")
    assert caplog.text.count(f"is_failure receives a stand-in for {module}.Slow") == 1
    threads = [each for each in threading.enumerate() if each.name == "nqnb-rebuild"]
    assert len(threads) == 1
    (tmp_path / "go on").touch()
    await asyncio.to_thread(threads[0].join, 30)


async def test_a_stop_does_not_wait_for_an_import(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module, "never")
    executor, running = runs(module, lambda error: True)
    await until_async((tmp_path / "begun").exists)
    executor.stop()
    result = await asyncio.wait_for(running, 20)
    assert is_being_imported(module)
    assert (result.ended, type(result.error).__qualname__) == (Ended.STOPPED, "Slow")
    (tmp_path / "go on").touch()


@pytest.mark.full
async def test_a_worker_goes_on_while_is_failure_judges_an_exception(
    nq: nqnb.Client, settings: nqnb.Settings, module: str, tmp_path: Path
) -> None:
    """The import takes three ack waits: without heartbeats the task would run twice."""
    worker = nqnb.Worker(settings)
    seen: list[str] = []

    def is_failure(error: Exception) -> bool:
        seen.append(type(error).__module__)
        return isinstance(error, sys.modules[module].Slow)

    worker.handler("slow", isolation="process", is_failure=is_failure)(raises(module))

    @worker.handler("quick")
    async def quick(job: nqnb.Job) -> int:
        return 5

    async with worker:
        slow = await nq.submit("slow", retry=3)
        await until_async((tmp_path / "begun").exists)
        assert await (await nq.submit("quick")).result(timeout=20) == 5
        await asyncio.sleep(3 * settings.ack_wait)
        assert is_being_imported(module)
        (tmp_path / "go on").touch()
        with pytest.raises(nqnb.TaskFailed, match="Slow: what"):
            await slow.result(timeout=30)
    assert seen == [module]
    assert (await slow.fetch()).attempt == 1
