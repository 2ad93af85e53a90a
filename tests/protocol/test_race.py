"""Tasks are cancelled at random moments between submit and end; nothing may be lost, and nothing may lie."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.history import assert_one_terminal_state, assert_queues_empty, read_history

import nqnb
from nqnb import Status
from nqnb.protocol import lifecycle
from nqnb.protocol.lifecycle import Ended
from nqnb.worker import execute
from nqnb.worker.executors import make_executor
from nqnb.worker.executors.executor import Executor, Result

pytestmark = pytest.mark.anyio

TASKS = 500
QUEUES = {"coroutine": 6, "thread": 6, "process": 2, "patient": 2}
"""The queues, and how many of so many tasks go to each: processes take long to start, and patient tasks to retry."""
LONG = 0.3
"""Seconds above which a wait is a schedule of the server, where it keeps those."""

PATIENCE = 1.5 * LONG
"""Seconds that a patient task waits for its retry at least: far longer than it runs."""

Answer = tuple[nqnb.CancelReceipt | nqnb.NotCancellable, float]
"""What a canceller was told, and when."""


class Watch:
    """Sees what executors receive, which no handler can tell by itself, and who has started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, diary: Path) -> None:
        self.diary = diary
        self.diary.touch()
        self.received: dict[str, list[Ended]] = defaultdict(list)
        monkeypatch.setattr(execute, "make_executor", self._make)

    def entered(self) -> dict[str, list[float]]:
        """When each task's handler was entered."""
        entered: dict[str, list[float]] = defaultdict(list)
        for line in self.diary.read_text().splitlines():
            task_id, moment = line.split()
            entered[task_id].append(float(moment))
        return entered

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
    diary = str(watch.diary)

    # Handlers in processes travel there, so all that this one uses has to be inside of it.
    def note(job: nqnb.Job) -> None:
        with open(diary, "a") as lines:
            lines.write(f"{job.id} {time.time()}\n")

    def plain(job: nqnb.Job, payload: dict[str, Any]) -> str:
        note(job)
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

    async def coroutine(job: nqnb.Job, payload: dict[str, Any]) -> str:
        note(job)
        if payload["progress"]:
            job.progress(1, 2)
        await asyncio.sleep(payload["seconds"])
        if job.attempt <= payload["failures"]:
            raise ValueError("as told")
        return job.id

    quick = nqnb.Backoff(0.01, 0.05)
    worker.handler("coroutine", grace=0.05, backoff=quick)(coroutine)
    worker.handler("thread", grace=0.05, backoff=quick)(plain)
    worker.handler("process", grace=0.05, backoff=quick, isolation="process")(plain)
    # Its retries wait for so long that they are schedules.
    worker.handler("patient", grace=0.05, backoff=nqnb.Backoff(2 * PATIENCE, 2 * PATIENCE))(coroutine)
    return worker


async def one(clients: list[nqnb.Client], dice: random.Random, answers: dict[str, list[Answer]]) -> None:
    """One task's life, and what its cancellers are told; each of them waits for a moment of its own."""
    queue = dice.choices(list(QUEUES), list(QUEUES.values()))[0]
    payload = {
        "seconds": dice.choice([0, dice.uniform(0, 0.06)]),
        "polite": dice.random() < 0.5,
        "progress": dice.random() < 0.3,
        "failures": dice.choice([0, 1] if queue == "patient" else [0, 0, 0, 1, 2]),
    }
    wait = dice.choices([0, dice.uniform(0, LONG), dice.uniform(LONG, 3 * LONG)], [16, 3, 1])[0]
    # Late enough to meet what starts slowly, or waits for its retry.
    last = wait + {"process": 0.4, "patient": 2 * PATIENCE}.get(queue, 0.1)
    moments = [dice.choice([0, dice.uniform(0, 0.1), dice.uniform(wait, last)]) for _ in range(dice.randrange(4))]
    cancellers = dice.choices(clients, k=len(moments))
    task = await dice.choice(clients).submit(
        queue, payload, retry=dice.choice([0, 1]), process_at=timedelta(seconds=wait) if wait else None
    )

    async def cancel(nq: nqnb.Client, moment: float) -> Answer:
        await asyncio.sleep(moment)
        try:
            return await nq.cancel(task.id), time.time()
        except nqnb.NotCancellable as error:
            return error, time.time()

    answers[task.id] = list(await asyncio.gather(*map(cancel, cancellers, moments)))
    await task.wait(timeout=30)


def check(queue: str, final: Status, entered: list[float], received: list[Ended], answers: list[Answer]) -> str:
    """What is wrong about how a task ended; nothing, one hopes."""
    if final is Status.DELETED and entered:
        return "is deleted, and started"
    if final is Status.CANCELLED and Ended.RETURNED in received:
        return "is cancelled, and returned"
    if final is Status.COMPLETED and received[-1] is not Ended.RETURNED:
        return "is completed, and did not return"
    if final is Status.FAILED and received[-1] is not Ended.FAILED:
        return "is failed, and did not fail"
    if final in (Status.CANCELLED, Status.DELETED) and not answers:
        return f"is {final.label}, and nobody wanted that"
    for answer, moment in answers:
        # Of the others, a run that was claimed before may be entered as late as a retry.
        if queue == "patient" and entered and entered[-1] > moment + 0.9 * PATIENCE:
            return f"was cancelled, and entered {entered[-1] - moment:.2f} s later"
        told = isinstance(answer, nqnb.NotCancellable) or not answer.stopping
        if told and answer.status is not final:
            return f"is {final.label}, and a canceller was told {answer.status}"
    return ""


@pytest.mark.parametrize(
    ("tasks", "run"), [(TASKS, 0), *(pytest.param(4 * TASKS, run, marks=pytest.mark.full) for run in range(3))]
)
async def test_no_cancel_is_lost_and_none_lies(
    kept_history: None,
    settings: nqnb.Settings,
    seed: int,
    tasks: int,
    run: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(lifecycle, "LONG_WAIT_SECONDS", LONG)
    watch, dice = Watch(monkeypatch, tmp_path / "diary"), random.Random(seed + run)
    answers: dict[str, list[Answer]] = {}
    gate = asyncio.Semaphore(48)

    async def gated(clients: list[nqnb.Client]) -> None:
        async with gate:
            await one(clients, dice, answers)

    async with nqnb.connect(settings) as nq, nqnb.connect(settings) as second, nqnb.connect(settings) as third:
        async with make_worker(settings, watch), make_worker(settings, watch):
            await asyncio.gather(*(gated([nq, second, third]) for _ in range(tasks)))
            await assert_queues_empty(nq, *QUEUES)
            streams = await nq.backend.ensure_queue("patient")
            config = (await nq.backend.connection.api(f"STREAM.INFO.{streams.tasks}"))["config"]
            assert bool(config.get("allow_msg_schedules")) == nq.backend.can_schedule, "no schedule was used"
        history = await read_history(nq)

    assert len(history) == len(answers) == tasks
    ends: Counter[tuple[str, str]] = Counter()
    entered = watch.entered()
    breaches = []
    for task_id, told in answers.items():
        final, queue = assert_one_terminal_state(task_id, history[task_id]), history[task_id][0].Queue
        ends[queue, final.label] += 1
        if wrong := check(queue, final, entered[task_id], watch.received[task_id], told):
            breaches.append(f"{task_id} {wrong}")
    assert not breaches
    print(f"{tasks} tasks: {dict(sorted(ends.items()))}")
    # Which queue's tasks are cancelled in time depends on the speed of the machine.
    for end in ("deleted", "cancelled", "completed"):
        assert sum(ends[queue, end] for queue in QUEUES) > len(QUEUES)
