"""Tasks are cancelled at random moments between submit and end; nothing may be lost, and nothing may lie."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from typing import Any

import pytest
from history import assert_one_terminal_state, assert_queues_empty, read_history

import nqnb
from nqnb.lifecycle import Ended
from nqnb.worker import execute
from nqnb.worker.executors import Executor, Result, make_executor

pytestmark = pytest.mark.anyio

TASKS = 500


class Watch:
    """Sees what executors receive, which no handler can tell by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: Counter[str] = Counter()
        self.received: dict[str, list[Ended]] = defaultdict(list)
        monkeypatch.setattr(execute, "make_executor", self._make)

    def _make(self, handler: Any, job: nqnb.Job) -> Executor:
        executor = make_executor(handler, job)
        run = executor.run

        async def watched() -> Result:
            result = await run()
            self.received[job.id].append(result.ended)
            return result

        executor.run = watched  # type: ignore[method-assign]  # the test stands between executor and worker
        return executor


def make_worker(settings: nqnb.Settings, watch: Watch) -> nqnb.Worker:
    worker = nqnb.Worker(settings, concurrency=16)

    @worker.handler("coroutine", grace=0.05, backoff=nqnb.Backoff(0.01, 0.05))
    async def coroutine(job: nqnb.Job, payload: dict[str, Any]) -> str:
        watch.started[job.id] += 1
        if payload["progress"]:
            job.progress(1, 2)
        await asyncio.sleep(payload["seconds"])
        if job.attempt <= payload["failures"]:
            raise ValueError("as told")
        return job.id

    @worker.handler("thread", grace=0.05, backoff=nqnb.Backoff(0.01, 0.05))
    def thread(job: nqnb.Job, payload: dict[str, Any]) -> str:
        watch.started[job.id] += 1
        if payload["progress"]:
            job.progress(1, 2)
        end = time.monotonic() + payload["seconds"]
        while time.monotonic() < end:
            if payload["polite"]:
                job.raise_if_cancelled()
            time.sleep(0.002)
        if job.attempt <= payload["failures"]:
            raise ValueError("as told")
        return job.id

    return worker


async def one(nq: nqnb.Client, dice: random.Random, answers: dict[str, Any]) -> None:
    payload = {
        "seconds": dice.choice([0, dice.uniform(0, 0.06)]),
        "polite": dice.random() < 0.5,
        "progress": dice.random() < 0.3,
        "failures": dice.choice([0, 0, 0, 1, 2]),
    }
    task = await nq.submit(dice.choice(["coroutine", "thread"]), payload, retry=dice.choice([0, 1]))
    await asyncio.sleep(dice.choice([0, dice.uniform(0, 0.1)]))
    try:
        answers[task.id] = await task.cancel()
    except nqnb.NotCancellable as error:
        answers[task.id] = error
    await task.wait(timeout=30)


@pytest.mark.parametrize("tasks", [TASKS, pytest.param(4 * TASKS, marks=pytest.mark.full)])
async def test_no_cancel_is_lost_and_none_lies(
    kept_history: None, settings: nqnb.Settings, seed: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, dice, answers = Watch(monkeypatch), random.Random(seed), {}
    gate = asyncio.Semaphore(48)

    async def gated(nq: nqnb.Client) -> None:
        async with gate:
            await one(nq, dice, answers)

    async with nqnb.connect(settings) as nq, make_worker(settings, watch), make_worker(settings, watch):
        await asyncio.gather(*(gated(nq) for _ in range(tasks)))
        await assert_queues_empty(nq, "coroutine", "thread")
        history = await read_history(nq)

    assert len(history) == len(answers) == tasks
    ends: Counter[str] = Counter()
    for task_id, answer in answers.items():
        final = assert_one_terminal_state(task_id, history[task_id])
        ends[final.label] += 1
        received = watch.received[task_id]
        if final is nqnb.Status.DELETED:
            assert not watch.started[task_id], f"{task_id} is deleted, and started"
        elif final is nqnb.Status.CANCELLED:
            assert Ended.RETURNED not in received, f"{task_id} is cancelled, and returned"
        elif final is nqnb.Status.COMPLETED:
            assert received[-1] is Ended.RETURNED, f"{task_id} is completed, and did not return"
        else:
            assert received[-1] is Ended.FAILED, f"{task_id} is failed, and did not fail"
        if isinstance(answer, nqnb.NotCancellable) or not answer.stopping:
            assert final is answer.status
    print(f"{tasks} tasks: {dict(ends)}")
    assert ends["deleted"]
    assert ends["cancelled"] > tasks / 20
    assert ends["completed"]
