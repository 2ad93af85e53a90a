"""The workload of an attack: clients that submit tasks and cancel them at planned moments.

If the attack shifts clocks, one more client runs in a separate process, in which the clock is wrong. The command
``python -m nqnb.testing.chaos.workload`` starts this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
from nqnb.testing.chaos.plan import LIMITS, CancelPlan, Moment, TaskPlan

_SIGN_TIMEOUT_SECONDS = 15.0
"""A cancel call is sent after this many seconds even if its target moment has not been observed."""
_END_TIMEOUT_SECONDS = 8.0
"""After this many seconds, an unfinished task no longer counts towards the limit on open tasks."""
_LIMITED_END_TIMEOUT_SECONDS = 60.0
"""Like `_END_TIMEOUT_SECONDS`, but for queues with limits. A shorter time would leave too many tasks at the end."""
_HELD_BACK_PART = 5
"""The last ``1 / _HELD_BACK_PART`` of all tasks are submitted only after every kind of fault has been injected."""


class Workload:
    """The workload of an attack: all submit and cancel calls.

    Args:
        plans: the tasks, in order of submission.
        clients: the clients that submit and cancel tasks.
        queues: the name of the queue for each kind of handler.
        in_flight: the maximum number of tasks that are open at the same time.
        deadline: the time, on the monotonic clock, after which no more tasks are submitted.
    """

    def __init__(
        self,
        plans: Sequence[TaskPlan],
        clients: Sequence[TaskClient],
        queues: dict[str, str],
        in_flight: int,
        deadline: float,
    ) -> None:
        self.submits: list[SubmitSeen] = []
        self.cancels: list[CancelSeen] = []
        self.crashes: list[str] = []
        """Descriptions of the client errors that are not instances of `NqnbError`."""
        self.ended: Counter[Status] = Counter()
        """The number of tasks that ended in each state, according to the observed writes."""
        self.fully_faulted = asyncio.Event()
        """An event that is set once every kind of fault has been injected. Some tasks are not submitted until then."""
        self._plans = plans
        self._clients = clients
        self._queues = queues
        self._gate = asyncio.Semaphore(in_flight)
        self._deadline = deadline
        self._signs: defaultdict[str, _Signs] = defaultdict(_Signs)
        self._cancelling: set[asyncio.Task[None]] = set()

    def hear(self, key: str, value: bytes) -> None:
        """Handle a published write to a task's entry. The write is only a hint, because the server may refuse it."""
        try:
            task = TaskMessage.decode(value)
        except MalformedMessage:
            return
        if task.meta.group:
            # This is a recurring task, which no client submitted.
            return
        signs = self._signs[task.ID]
        if task.Status is Status.PROCESSING:
            signs.claimed.set()
        elif task.Status is Status.PENDING and task.CurrentRetry:
            signs.retrying.set()
        elif task.Status.terminal and not signs.ended.is_set():
            signs.ended.set()
            self.ended[task.Status] += 1

    async def run(self) -> None:
        """Submit all tasks, and send the planned cancel calls."""
        first_held_back = len(self._plans) - max(1, len(self._plans) // _HELD_BACK_PART)
        running: set[asyncio.Task[None]] = set()
        try:
            for number, plan in enumerate(self._plans):
                if number >= first_held_back:
                    await _wait(self.fully_faulted, self._deadline - time.monotonic())
                await self._gate.acquire()
                if time.monotonic() > self._deadline:
                    self._gate.release()
                    break
                task = asyncio.ensure_future(self._submit_and_wait(plan))
                running.add(task)
                task.add_done_callback(running.discard)
            while waiting := running | self._cancelling:
                await asyncio.wait(waiting, timeout=1.0)
        finally:
            for task in running | self._cancelling:
                task.cancel()
            await asyncio.gather(*running, *self._cancelling, return_exceptions=True)

    async def _submit_and_wait(self, plan: TaskPlan) -> None:
        try:
            signs = await self._submit(plan)
            if signs is not None:
                timeout = _LIMITED_END_TIMEOUT_SECONDS if plan.kind in LIMITS else _END_TIMEOUT_SECONDS
                await _wait(signs.ended, timeout + plan.wait)
        finally:
            self._gate.release()

    async def _submit(self, plan: TaskPlan) -> _Signs | None:
        queue = self._queues[plan.kind.value]
        order: dict[str, Any] = {
            "do": "submit",
            "queue": queue,
            "payload": plan.payload,
            "task": new_task_id() if plan.chosen else "",
            "retry": plan.retry,
            "wait": plan.wait,
            "serial": plan.serial,
        }
        seen = SubmitSeen(plan, queue, time.monotonic(), task=order["task"])
        self.submits.append(seen)
        early = [cancel for cancel in plan.cancels if cancel.aim is Moment.SUBMIT]
        for cancel in early:
            self._cancel_later(seen.task, cancel)
        answer = await self._perform(plan.client, order)
        seen.ended, seen.error, seen.task = time.monotonic(), answer.error, answer.task or seen.task
        if not seen.task or (answer.error and answer.error != "Unconfirmed"):
            return None
        for cancel in plan.cancels:
            if cancel not in early:
                self._cancel_later(seen.task, cancel)
        return self._signs[seen.task]

    def _cancel_later(self, task: str, plan: CancelPlan) -> None:
        cancelling = asyncio.ensure_future(self._cancel(task, plan))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancel(self, task: str, plan: CancelPlan) -> None:
        signs = self._signs[task]
        sign = signs.of(plan.aim)
        if sign is not None and not sign.is_set():
            # No other sign can follow once the task has ended.
            waits = [asyncio.ensure_future(event.wait()) for event in (sign, signs.ended)]
            try:
                await asyncio.wait(waits, timeout=_SIGN_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        if plan.after:
            await asyncio.sleep(plan.after)
        seen = CancelSeen(task, plan.aim, time.monotonic())
        self.cancels.append(seen)
        answer = await self._perform(plan.client, {"do": "cancel", "task": task})
        seen.status, seen.stopping, seen.error = answer.status, answer.stopping, answer.error
        seen.ended = time.monotonic()

    async def _perform(self, number: int, order: Mapping[str, Any]) -> Answer:
        answer = await self._clients[number % len(self._clients)].perform(order)
        if answer.crashed:
            self.crashes.append(f"a client raised {answer.error} in {order['do']}: {answer.text}")
        return answer


class _Signs:
    """The asyncio events for the stages of a task's life. Each event is set when the matching write is observed."""

    __slots__ = ("claimed", "ended", "retrying")

    def __init__(self) -> None:
        self.claimed, self.retrying, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def of(self, aim: Moment) -> asyncio.Event | None:
        """Return the event to wait for before cancelling a task at the given moment, or None if no wait is needed."""
        if aim in (Moment.CLAIM, Moment.STARTED, Moment.RUNNING, Moment.FINISH):
            return self.claimed
        if aim is Moment.RETRY:
            return self.retrying
        return self.ended if aim is Moment.ENDED else None


async def _wait(event: asyncio.Event, seconds: float) -> None:
    if not event.is_set() and seconds > 0:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except asyncio.TimeoutError:
            return


# -- clients


@dataclass(frozen=True)
class Answer:
    """The result of a client call: the task's id and state, or the name and message of the error."""

    task: str = ""
    status: Status | None = None
    stopping: bool = False
    error: str = ""
    text: str = ""
    crashed: bool = False
    """Whether the call raised an error that is not an `NqnbError`."""


class TaskClient(Protocol):
    """A client that submits and cancels tasks, and runs in this process or in another process."""

    async def perform(self, order: Mapping[str, Any]) -> Answer:
        """Make the call that a dict describes: ``{"do": "submit", …}`` or ``{"do": "cancel", "task": …}``."""
        ...


class LocalClient:
    """A client in this process."""

    def __init__(self, nq: Client) -> None:
        self._nq = nq

    async def perform(self, order: Mapping[str, Any]) -> Answer:
        """Make the requested call in this process; see `TaskClient.perform`."""
        return await _perform(self._nq, order)


class RemoteClient:
    """A client in a separate process with a wrong clock.

    Args:
        settings: the fields of the client's `Settings`.
        clock: the number of seconds by which the client's clock is ahead. It is negative if the clock is behind.
        environment: the environment variables of the process.
    """

    def __init__(self, settings: Mapping[str, Any], clock: float, environment: Mapping[str, str]) -> None:
        self._orders = {"settings": dict(settings), "clock": clock}
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the client's process."""
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

    async def perform(self, order: Mapping[str, Any]) -> Answer:
        """Send the requested call to the client's process, and return the answer; see `TaskClient.perform`."""
        if self._reader is None or self._reader.done():
            return Answer(error="ConnectionFailed", text="the client's process has ended")
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write({**order, "number": number})
            return await self._waiting[number]
        except OSError as error:
            return Answer(error="ConnectionFailed", text=f"the client's process has ended: {error}")
        finally:
            del self._waiting[number]

    async def stop(self) -> list[str]:
        """Stop the client's process.

        Returns:
            A list with a description of the crash if the process has already crashed, otherwise an empty list.
        """
        process, said = self._process, []
        self._process = None
        if process is not None and self._reader is not None and self._reader.done():
            said.append(f"the client with the wrong clock exited unexpectedly with code {await process.wait()}")
        elif process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        return said

    def _write(self, order: Mapping[str, Any]) -> None:
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            raise BrokenPipeError(
                "cannot send a command to the client's process: its stdin is closed. Check whether it has crashed."
            )
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


async def _perform(nq: Client, order: Mapping[str, Any]) -> Answer:
    task = str(order.get("task") or "")
    try:
        if order["do"] == "cancel":
            receipt = await nq.cancel(task)
            return Answer(task, receipt.status, receipt.stopping)
        submitted = await nq.submit(
            order["queue"],
            order["payload"],
            id=task or None,
            retry=order["retry"],
            process_at=timedelta(seconds=order["wait"]) if order["wait"] else None,
            serial=order["serial"] or None,
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
    except Exception as error:  # noqa: BLE001  any other error is a breach, and the attack continues
        return Answer(task, error=type(error).__name__, text=traceback.format_exc(), crashed=True)


async def _serve() -> None:
    orders = read_orders()
    shift_clock(orders["clock"])
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()

    async def answer(nq: Client, order: dict[str, Any]) -> None:
        fields = {**vars(await _perform(nq, order)), "number": order["number"]}
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    async with connect(Settings.local(**orders["settings"])) as nq:
        while text := await reader.readline():
            task = asyncio.ensure_future(answer(nq, json.loads(text)))
            running.add(task)
            task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(_serve())
