"""Submits the tasks, and cancels them at the moments of their lives that their plans name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from nqnb.client import Client, connect
from nqnb.errors import MalformedMessage, NotCancellable, NqnbError, TaskExists, Unconfirmed, UnknownTask
from nqnb.protocol.names import new_task_id
from nqnb.protocol.wire import Status, TaskMessage
from nqnb.settings import Settings
from nqnb.testing.chaos.chaos_worker import read_orders, shift_clock
from nqnb.testing.chaos.evidence import CancelSeen, SubmitSeen
from nqnb.testing.chaos.plan import CancelPlan, Moment, TaskPlan

_SIGN_TAKES_SECONDS = 15.0
"""Seconds after which a cancel comes without the sign of the moment that it aims at."""
_END_TAKES_SECONDS = 8.0
"""Seconds for which a task that has not ended keeps another one from being submitted."""
_HELD_BACK = 5
"""One of so many tasks is held back until each kind of fault was injected."""


class _Life:
    """What was heard of one task as its entry was written."""

    __slots__ = ("claimed", "ended", "retrying")

    def __init__(self) -> None:
        self.claimed, self.retrying, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def sign(self, aim: Moment) -> asyncio.Event | None:
        """What a cancel of that moment waits for; None where it waits for nothing."""
        if aim in (Moment.CLAIM, Moment.STARTED, Moment.RUNNING, Moment.FINISH):
            return self.claimed
        if aim is Moment.RETRY:
            return self.retrying
        return self.ended if aim is Moment.ENDED else None


class Load:
    """The tasks of an attack.

    Args:
        plans: the tasks, in their order.
        hands: who submits and cancels.
        queues: the queue of each kind.
        in_flight: how many tasks are open at most.
        until: when nothing more is submitted, on the monotonic clock.
    """

    def __init__(
        self, plans: Sequence[TaskPlan], hands: Sequence[Hand], queues: dict[str, str], in_flight: int, until: float
    ) -> None:
        self.submits: list[SubmitSeen] = []
        self.cancels: list[CancelSeen] = []
        self.ended: Counter[Status] = Counter()
        """The ends that were heard of."""
        self.fully_faulted = asyncio.Event()
        """Set when each kind of fault was injected; a part of the tasks is kept back for it."""
        self.done = False
        self._plans = plans
        self._hands = hands
        self._queues = queues
        self._gate = asyncio.Semaphore(in_flight)
        self._until = until
        self._lives: defaultdict[str, _Life] = defaultdict(_Life)
        self._cancelling: set[asyncio.Task[None]] = set()

    def hear(self, key: str, value: bytes) -> None:
        """Hear an entry as it is written; a hint only, for a refused write is heard, too."""
        try:
            task = TaskMessage.decode(value)
        except MalformedMessage:
            return
        life = self._lives[task.ID]
        if task.Status is Status.PROCESSING:
            life.claimed.set()
        elif task.Status is Status.PENDING and task.CurrentRetry:
            life.retrying.set()
        elif task.Status.terminal and not life.ended.is_set():
            life.ended.set()
            self.ended[task.Status] += 1

    async def run(self, changed: Callable[[], None]) -> None:
        """Submit and cancel everything.

        Args:
            changed: called now and then.
        """
        back = len(self._plans) - max(1, len(self._plans) // _HELD_BACK)
        running: set[asyncio.Task[None]] = set()
        try:
            for number, plan in enumerate(self._plans):
                if number >= back:
                    await self._wait(self.fully_faulted, self._until - time.monotonic())
                await self._gate.acquire()
                if time.monotonic() > self._until:
                    self._gate.release()
                    break
                task = asyncio.ensure_future(self._live(plan))
                running.add(task)
                task.add_done_callback(running.discard)
                changed()
            while waiting := running | self._cancelling:
                await asyncio.wait(waiting, timeout=1.0)
                changed()
        finally:
            for task in running | self._cancelling:
                task.cancel()
            await asyncio.gather(*running, *self._cancelling, return_exceptions=True)
        self.done = True

    async def _live(self, plan: TaskPlan) -> None:
        try:
            life = await self._submit(plan)
            if life is not None:
                await self._wait(life.ended, _END_TAKES_SECONDS + plan.wait)
        finally:
            self._gate.release()

    async def _submit(self, plan: TaskPlan) -> _Life | None:
        queue = self._queues[plan.kind.value]
        order: dict[str, Any] = {
            "do": "submit",
            "queue": queue,
            "payload": plan.payload,
            "task": new_task_id() if plan.chosen else "",
            "retry": plan.retry,
            "wait": plan.wait,
        }
        seen = SubmitSeen(plan, queue, time.monotonic(), task=order["task"])
        self.submits.append(seen)
        early = [each for each in plan.cancels if each.aim is Moment.SUBMIT]
        for each in early:
            self._cancel_later(seen.task, each)
        answer = await self._hands[plan.hand % len(self._hands)].do(order)
        seen.ended, seen.error, seen.task = time.monotonic(), answer.error, answer.task or seen.task
        if not seen.task or (answer.error and answer.error != "Unconfirmed"):
            return None
        for each in plan.cancels:
            if each not in early:
                self._cancel_later(seen.task, each)
        return self._lives[seen.task]

    def _cancel_later(self, task: str, plan: CancelPlan) -> None:
        cancelling = asyncio.ensure_future(self._cancel(task, plan))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancel(self, task: str, plan: CancelPlan) -> None:
        life = self._lives[task]
        sign = life.sign(plan.aim)
        if sign is not None and not sign.is_set():
            # What has ended gives no other sign.
            waits = [asyncio.ensure_future(each.wait()) for each in (sign, life.ended)]
            try:
                await asyncio.wait(waits, timeout=_SIGN_TAKES_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()
        if plan.after:
            await asyncio.sleep(plan.after)
        seen = CancelSeen(task, plan.aim, time.monotonic())
        self.cancels.append(seen)
        answer = await self._hands[plan.hand % len(self._hands)].do({"do": "cancel", "task": task})
        seen.status, seen.stopping, seen.error = answer.status, answer.stopping, answer.error
        seen.ended = time.monotonic()

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> None:
        if not event.is_set() and seconds > 0:
            try:
                await asyncio.wait_for(event.wait(), seconds)
            except asyncio.TimeoutError:
                return


@dataclass(frozen=True)
class Answer:
    """What a client was told: an id or a state, or the error's name and text."""

    task: str = ""
    status: Status | None = None
    stopping: bool = False
    error: str = ""
    text: str = ""


class Hand(Protocol):
    """A client, wherever it is."""

    async def do(self, order: Mapping[str, Any]) -> Answer:
        """Carry out an order: ``{"do": "submit", …}`` or ``{"do": "cancel", "task": …}``."""
        ...


async def carry_out(nq: Client, order: Mapping[str, Any]) -> Answer:
    """Carry out an order, and say how it went."""
    task = str(order.get("task") or "")
    try:
        if order["do"] == "cancel":
            receipt = await nq.cancel(task)
            return Answer(task, receipt.status, receipt.stopping)
        if order["do"] == "workers":
            return Answer(text=" ".join(each.id for each in await nq.workers()))
        submitted = await nq.submit(
            order["queue"],
            order["payload"],
            id=task or None,
            retry=order["retry"],
            process_at=timedelta(seconds=order["wait"]) if order["wait"] else None,
        )
        return Answer(submitted.id)
    except NotCancellable as error:
        return Answer(task, error.status, error=type(error).__name__, text=str(error))
    except (UnknownTask, TaskExists) as error:
        return Answer(task, error=type(error).__name__, text=str(error))
    except Unconfirmed as error:
        return Answer(task or error.task_id or "", error=type(error).__name__, text=str(error))
    except NqnbError as error:
        return Answer(task, error=type(error).__name__, text=str(error))


class NearHand:
    """A client of this process."""

    def __init__(self, nq: Client) -> None:
        self._nq = nq

    async def do(self, order: Mapping[str, Any]) -> Answer:
        """See `Hand.do`."""
        return await carry_out(self._nq, order)


class FarHand:
    """A client in a process of its own, whose clock is wrong.

    Args:
        settings: the fields of its `Settings`.
        clock: by how many seconds its clock is ahead.
        environment: the process's.
    """

    def __init__(self, settings: Mapping[str, Any], clock: float, environment: Mapping[str, str]) -> None:
        self._orders = {"settings": dict(settings), "clock": clock}
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nqnb.testing.chaos.workload",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
        )
        self._write(self._orders)
        self._reader = asyncio.ensure_future(self._read())

    async def do(self, order: Mapping[str, Any]) -> Answer:
        """See `Hand.do`."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write({**order, "number": number})
            return await self._waiting[number]
        except OSError as error:
            return Answer(error="ConnectionFailed", text=f"the client's process is gone: {error}")
        finally:
            del self._waiting[number]

    async def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def _write(self, order: Mapping[str, Any]) -> None:
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            raise BrokenPipeError("it is not started")
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def _read(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        while text := await self._process.stdout.readline():
            found = json.loads(text)
            waiting = self._waiting.get(found.pop("number"))
            status = found.pop("status")
            if waiting is not None and not waiting.done():
                waiting.set_result(Answer(**found, status=None if status is None else Status(status)))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(Answer(error="ConnectionFailed", text="the client's process has ended"))


async def _serve() -> None:
    orders = read_orders()
    shift_clock(orders["clock"])
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()

    async def answer(nq: Client, order: dict[str, Any]) -> None:
        told = await carry_out(nq, order)
        fields = {**vars(told), "number": order["number"], "status": told.status}
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    async with connect(Settings(**orders["settings"])) as nq:
        while text := await reader.readline():
            task = asyncio.ensure_future(answer(nq, json.loads(text)))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(_serve())
