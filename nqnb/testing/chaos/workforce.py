"""The worker processes of an attack: start them, kill them, suspend them, and see that none is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nqnb
from nqnb.testing.chaos.diary import Line, read_diary
from nqnb.testing.chaos.evidence import LifeSeen

MARK = "NQNB_CHAOS"
"""The environment variable by which the processes of one attack are known."""
_GONE_TAKES_SECONDS = 10.0
_STOP_TAKES_SECONDS = 20.0


class Workforce:
    """The worker processes, each in one of some places.

    Args:
        folder: for their diaries and logs.
        orders: what `nqnb.testing.chaos.labour` is told, but for the diary and what is a place's own.
        places: what is a place's own: the settings' address and the clock.
    """

    def __init__(self, folder: Path, orders: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> None:
        self.lives: list[LifeSeen] = []
        self.mark = secrets.token_hex(8)
        self._folder = folder
        self._orders = dict(orders)
        self._places = places
        self._running: dict[int, tuple[LifeSeen, subprocess.Popen[bytes]]] = {}
        """What runs in each place."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the attack's processes."""
        # The package may be a source tree that only this process has on its path.
        path = os.pathsep.join(filter(None, [str(Path(nqnb.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        return {**os.environ, MARK: self.mark, "PYTHONPATH": path}

    @property
    def places(self) -> int:
        """How many places there are."""
        return len(self._places)

    def number_at(self, place: int) -> int | None:
        """The number of the worker process in a place."""
        found = self._running.get(place)
        return None if found is None else found[0].number

    def start(self, place: int) -> None:
        """Start a worker process in a place where none runs."""
        number = len(self.lives)
        own = self._places[place]
        orders = {**self._orders, **own, "diary": str(self._diary(number))}
        orders["settings"] = {**self._orders["settings"], **own["settings"]}
        with (self._folder / f"worker-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "nqnb.testing.chaos.labour"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        if process.stdin is None:
            raise RuntimeError("its stdin is a pipe")
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.flush()
        life = LifeSeen(number, process.pid, time.monotonic())
        self.lives.append(life)
        self._running[place] = life, process

    async def kill(self, place: int) -> None:
        """Kill the worker process in a place (SIGKILL)."""
        found = self._running.pop(place, None)
        if found is not None:
            life, process = found
            process.kill()
            life.killed = True
            await asyncio.to_thread(process.wait)
            life.died = time.monotonic()
            _close(process)

    def suspend(self, place: int) -> None:
        """Suspend the worker process in a place (SIGSTOP), until it is resumed."""
        if place in self._running and hasattr(signal, "SIGSTOP"):
            self._running[place][1].send_signal(signal.SIGSTOP)

    def resume(self, place: int) -> None:
        """Resume the worker process in a place."""
        if place in self._running and hasattr(signal, "SIGCONT"):
            self._running[place][1].send_signal(signal.SIGCONT)

    def look(self) -> list[str]:
        """Note processes that ended by themselves, and say so."""
        said = []
        for place, (life, process) in list(self._running.items()):
            if process.poll() is not None:
                life.died = time.monotonic()
                said.append(f"worker process {life.number} ended by itself with code {process.returncode}")
                _close(process)
                del self._running[place]
        return said

    async def stop(self) -> list[str]:
        """Stop all (SIGTERM); says which did not stop, and kills those."""
        said = self.look()
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _STOP_TAKES_SECONDS
        while any(process.poll() is None for _, process in self._running.values()) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for life, process in self._running.values():
            if process.poll() is None:
                said.append(f"worker process {life.number} did not stop within {_STOP_TAKES_SECONDS:g} s of SIGTERM")
            elif process.returncode:
                said.append(f"worker process {life.number} stopped with code {process.returncode}")
        await self.kill_all()
        return said

    async def kill_all(self) -> None:
        """Kill all that still run."""
        for place in list(self._running):
            life, process = self._running[place]
            if process.poll() is None:
                await self.kill(place)
            else:
                life.died = life.died or time.monotonic()
                _close(process)
                del self._running[place]

    async def leftovers(self) -> list[str]:
        """Name the processes of this attack that are still there, those of its handlers too (on Linux)."""
        until = time.monotonic() + _GONE_TAKES_SECONDS
        while (found := self._marked()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return [f"process {pid} was left behind: {command}" for pid, command in found.items()]

    def end_leftovers(self) -> None:
        """Kill what is left behind."""
        for pid in self._marked():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def diaries(self) -> list[Line]:
        """Read every diary."""
        return [line for life in self.lives for line in read_diary(self._diary(life.number), life.number)]

    def log_tail(self, number: int, lines: int = 20) -> list[str]:
        """The end of a worker process's log."""
        return (self._folder / f"worker-{number}.log").read_text(errors="replace").splitlines()[-lines:]

    def _diary(self, number: int) -> Path:
        return self._folder / f"diary-{number}"

    def _marked(self) -> dict[int, str]:
        mark, found = f"{MARK}={self.mark}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if state != "Z":
                        found[int(folder.name)] = command
        return found


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
