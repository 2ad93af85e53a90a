"""A command, and an operation on many tasks, collect garbage less often than the program that runs them."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import nqnb
from nqnb import cli
from nqnb.cli import main
from nqnb.garbage import THRESHOLD, rare_collections
from nqnb.jetstream.connection import Connection
from nqnb.protocol.cancel import cancel_many


def test_a_command_collects_garbage_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = gc.get_threshold(), []

    def note(*_: object) -> int:
        during.append(gc.get_threshold())
        return 0

    monkeypatch.setattr(cli, "_run", note)
    assert main([]) == 0
    assert [threshold[0] for threshold in during] == [THRESHOLD]
    assert gc.get_threshold() == before


def test_disabled_or_rarer_collections_stay_as_they_are() -> None:
    before = gc.get_threshold()
    try:
        for threshold in (0, 2 * THRESHOLD):
            gc.set_threshold(threshold)
            with rare_collections():
                assert gc.get_threshold()[0] == threshold
            assert gc.get_threshold()[0] == threshold
    finally:
        gc.set_threshold(*before)


def test_the_last_of_overlapping_blocks_restores_the_thresholds() -> None:
    before = gc.get_threshold()
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] == THRESHOLD
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


@pytest.mark.anyio
async def test_a_submission_of_many_tasks_collects_garbage_less_often(server: nqnb.DevServer) -> None:
    before, during = gc.get_threshold(), []

    def payloads() -> Iterator[bytes]:
        for _ in range(2):
            during.append(gc.get_threshold())
            yield b"x"

    async with nqnb.connect(server.url) as nq:
        await nq.submit_many("garbage", payloads())
    assert [threshold[0] for threshold in during] == [THRESHOLD] * 2
    assert gc.get_threshold() == before


@pytest.mark.anyio
@pytest.mark.parametrize(
    "operation",
    [
        lambda nq, task: nq.tasks(),
        lambda nq, task: nq.purge_queue("garbage"),
        lambda nq, task: nq.prune(60),
        lambda nq, task: cancel_many(nq, [task.id], None, {}),
    ],
    ids=["tasks", "purge_queue", "prune", "cancel_many"],
)
async def test_an_operation_on_many_tasks_collects_garbage_less_often(
    server: nqnb.DevServer,
    monkeypatch: pytest.MonkeyPatch,
    operation: Callable[[nqnb.Client, nqnb.Task], Awaitable[object]],
) -> None:
    before, during = gc.get_threshold(), set[int]()
    ask = Connection.ask

    def noted(*args: Any, **options: Any) -> Awaitable[Any]:
        during.add(gc.get_threshold()[0])
        return ask(*args, **options)

    async with nqnb.connect(server.url) as nq:
        task = await nq.submit("garbage")
        monkeypatch.setattr(Connection, "ask", noted)
        await operation(nq, task)
        monkeypatch.undo()
    assert THRESHOLD in during
    assert gc.get_threshold() == before
