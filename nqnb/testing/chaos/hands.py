"""Who submits and cancels: clients of the attack's own process, and one in a process whose clock is an hour off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from nqnb.client import Client, connect
from nqnb.errors import NotCancellable, NqnbError, TaskExists, Unconfirmed, UnknownTask
from nqnb.protocol.wire import Status
from nqnb.settings import Settings
from nqnb.testing.chaos.labour import read_orders, shift_clock


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
            "nqnb.testing.chaos.hands",
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
