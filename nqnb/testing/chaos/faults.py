"""Inject faults at random times: kill and suspend workers, kill servers, cut links and fill the store."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nqnb.errors import DevServerError, NoRoom, NqnbError, ServerRefused
from nqnb.testing.chaos.evidence import FaultSeen
from nqnb.testing.chaos.plan import ChaosOptions
from nqnb.testing.chaos.testbed import ChaosWorkers, Testbed
from nqnb.testing.chaos.workload import Workload

CLOCK_SECONDS = 3600.0
_BALLAST = "nqnb-chaos-ballast"
_BALLAST_BYTES = (768 * 2**10, 64 * 2**10, 4 * 2**10, 256)
_FILL_TIMEOUT_SECONDS = 20.0
_MAKE_ROOM_TIMEOUT_SECONDS = 30.0


class Faults:
    """The fault injector of an attack. Each round injects every kind of fault once, in random order.

    Args:
        options: the options of the attack.
        testbed: the servers and links.
        workers: the worker processes.
        workload: the submit and cancel calls.
    """

    def __init__(self, options: ChaosOptions, testbed: Testbed, workers: ChaosWorkers, workload: Workload) -> None:
        self.seen: list[FaultSeen] = []
        self._options = options
        self._testbed = testbed
        self._workers = workers
        self._workload = workload
        self._dice = random.Random(f"faults {options.seed}")
        self._background: set[asyncio.Task[None]] = set()
        self._busy: set[int] = set()
        """The numbers of the slots whose worker processes are suspended or restarting."""
        self._cut: set[int] = set()
        """The numbers of the links that are currently cut or slow."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "worker": self._worker,
            "server": self._server,
            "link": self._link,
            "full": self._full,
            "cluster": self._cluster,
        }
        self._kinds = {kind: inject for kind, inject in kinds.items() if kind in options.faults}
        if testbed.cluster is not None:
            # In a cluster, the fault `cluster` kills the servers, and the store has no size limit.
            self._kinds.pop("server", None)
            self._kinds.pop("full", None)

    async def run(self) -> None:
        """Inject faults until cancelled. Afterwards, call `heal` to undo all faults."""
        if not self._kinds:
            self._workload.fully_faulted.set()
            return
        while True:
            deck = list(self._kinds.values())
            self._dice.shuffle(deck)
            for inject in deck:
                await asyncio.sleep(self._dice.uniform(0.2, 1.0))
                self._restart_crashed()
                await inject()
            self._workload.fully_faulted.set()

    async def heal(self) -> None:
        """Undo all faults: restart the servers and workers, restore the links, and free space in the store.

        Raises:
            DevServerError: a server did not restart.
        """
        for each in self._background:
            each.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._testbed.server is not None and not self._testbed.server.running:
            await asyncio.to_thread(self._testbed.server.restart)
        if self._testbed.cluster is not None:
            for number in range(len(self._testbed.cluster.servers)):
                if number not in self._testbed.cluster.running:
                    await asyncio.to_thread(self._testbed.cluster.restart, number)
            await asyncio.to_thread(self._testbed.cluster.wait_ready)
        if "link" in self._options.faults:
            for link in self._testbed.links:
                await link.heal()
        if self._testbed.options.settings is None and "full" in self._kinds:
            await self._make_room()
        for place in range(self._workers.places):
            self._workers.resume(place)
            if self._workers.number_at(place) is None:
                self._workers.start(place)
        now = time.monotonic()
        for fault in self.seen:
            fault.ended = fault.ended or now

    def note_standing(self, kind: str, what: str, numbers: tuple[int, ...] | None = None) -> None:
        """Record a fault that lasts for the whole attack."""
        self._note(kind, what, numbers).harmless = True

    def _note(self, kind: str, what: str, numbers: tuple[int, ...] | None) -> FaultSeen:
        fault = FaultSeen(kind, what, time.monotonic(), numbers=numbers)
        self.seen.append(fault)
        return fault

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- workers

    def _restart_crashed(self) -> None:
        """Restart worker processes that crashed, and record each crash as a fault."""
        for number in self._workers.note_crashes():
            self._note("worker", f"worker process {number} crashed", (number,)).ended = time.monotonic()
        for place in range(self._workers.places):
            if place not in self._busy and self._workers.number_at(place) is None:
                self._workers.start(place)

    async def _worker(self) -> None:
        free = [place for place in range(self._workers.places) if place not in self._busy]
        if len(free) < 2:
            # One worker stays undisturbed, so that tasks can run.
            return
        place = self._dice.choice(free)
        if self._dice.random() < 0.6:
            await self._kill(place)
        else:
            self._busy.add(place)
            self._in_background(self._suspend(place, self._options.ack_wait * self._dice.uniform(1.1, 1.5)))

    async def _kill(self, place: int) -> None:
        number = self._workers.number_at(place)
        if number is None:
            return
        fault = self._note("worker", f"worker process {number} was killed", (number,))
        self._busy.add(place)
        await self._workers.kill(place)
        self._in_background(self._start_later(place, fault, self._dice.choice([0.0, self._dice.uniform(0, 1.5)])))

    async def _start_later(self, place: int, fault: FaultSeen, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._workers.start(place)
        fault.ended = time.monotonic()
        self._busy.discard(place)

    async def _suspend(self, place: int, seconds: float) -> None:
        number = self._workers.number_at(place)
        if number is None:
            self._busy.discard(place)
            return
        fault = self._note("worker", f"worker process {number} was suspended for {seconds:.1f} s", (number,))
        self._workers.suspend(place, seconds)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._workers.resume(place)
            fault.ended = time.monotonic()
            self._busy.discard(place)

    async def _wait_and_perhaps_kill(self, seconds: float, *, always: bool = False) -> None:
        """Sleep, and sometimes kill a worker meanwhile. If ``always`` is true, kill a worker whenever possible."""
        free = [place for place in range(self._workers.places) if place not in self._busy]
        if "worker" in self._kinds and len(free) > 1 and (always or self._dice.random() < 0.5):
            first = seconds * self._dice.uniform(0.1, 0.9)
            await asyncio.sleep(first)
            await self._kill(self._dice.choice(free))
            seconds -= first
        await asyncio.sleep(max(0.0, seconds))

    # -- one server

    async def _server(self) -> None:
        server = self._testbed.server
        if server is None:
            return
        lease = self._options.ack_wait
        seconds = self._dice.choice([self._dice.uniform(0, 0.5), self._dice.uniform(0.3, 1.5), lease * 1.3])
        fault = self._note("server", f"the server was killed and restarted after {seconds:.1f} s", None)
        await asyncio.to_thread(server.kill)
        await self._wait_and_perhaps_kill(seconds)
        await asyncio.to_thread(server.restart)
        fault.ended = time.monotonic()

    async def _full(self) -> None:
        connection = self._testbed.connection
        if connection is None:
            return
        seconds = self._dice.uniform(0.5, 3)
        fault = self._note("full", f"the store was full for {seconds:.1f} s", None)
        try:
            body = {"name": _BALLAST, "subjects": [_BALLAST], "storage": "file"}
            await connection.insist(lambda: connection.api(f"STREAM.CREATE.{_BALLAST}", body))
            await self._fill()
            filling = asyncio.ensure_future(self._keep_full())
            try:
                await self._wait_and_perhaps_kill(seconds, always=True)
            finally:
                filling.cancel()
                await asyncio.gather(filling, return_exceptions=True)
        finally:
            await self._make_room()
            fault.ended = time.monotonic()

    async def _fill(self) -> None:
        deadline = time.monotonic() + _FILL_TIMEOUT_SECONDS
        for size in _BALLAST_BYTES:
            while time.monotonic() < deadline and await self._store_ballast(size):
                pass

    async def _keep_full(self) -> None:
        """Refill the store until cancelled, because each task that ends frees some space."""
        while True:
            await asyncio.sleep(0.05)
            await self._fill()

    async def _store_ballast(self, size: int) -> bool:
        """Store a message of ``size`` bytes. Return False if the store has no room for the message."""
        connection = self._testbed.connection
        if connection is None:
            return False
        try:
            await connection.publish(_BALLAST, bytes(size))
        except (NoRoom, ServerRefused):
            return False
        except NqnbError:
            await asyncio.sleep(0.05)
        return True

    async def _make_room(self) -> None:
        connection = self._testbed.connection
        if connection is not None:
            with contextlib.suppress(ServerRefused):
                await connection.insist(lambda: connection.api(f"STREAM.DELETE.{_BALLAST}"), _MAKE_ROOM_TIMEOUT_SECONDS)

    # -- links

    async def _link(self) -> None:
        free = [number for number in range(len(self._testbed.links)) if number not in self._cut]
        if free:
            number = self._dice.choice(free)
            self._cut.add(number)
            self._in_background(self._cut_link(number))

    async def _cut_link(self, number: int) -> None:
        link = self._testbed.links[number]
        process = self._workers.number_at(number) if number < self._workers.places else None
        name = "a starting worker process" if process is None else f"worker process {process}"
        if number == self._workers.places:
            name = "a client"
        seconds = self._dice.choice([self._dice.uniform(0, 0.5), self._dice.uniform(0.5, 1.5 * self._options.ack_wait)])
        how = self._dice.choice(["refused", "swallowed", "swallowed and reset", "reset", "slow"])
        if how == "reset":
            seconds = 0.1
        fault = self._note("link", f"the link of {name} was disturbed for {seconds:.1f} s: {how}", None)
        # If another worker process is started in the slot in the meantime, that process is also cut off.
        fault.numbers = () if number == self._workers.places else None if process is None else (process,)
        try:
            if how == "refused":
                await link.refuse()
            elif how == "reset":
                link.hang_up()
            elif how == "slow":
                link.slow_down(self._dice.uniform(0.02, 0.2))
            else:
                link.swallow()
            await asyncio.sleep(seconds)
            if how == "swallowed and reset":
                link.hang_up()
        finally:
            await link.heal()
            later = self._workers.number_at(number) if number < self._workers.places else None
            if fault.numbers and later is not None:
                fault.numbers = (*fault.numbers, later)
            fault.ended = time.monotonic()
            self._cut.discard(number)

    # -- a cluster

    async def _cluster(self) -> None:
        cluster = self._testbed.cluster
        if cluster is None:
            return
        stream = self._dice.choice(list(self._testbed.queues.values()))
        action = self._dice.choice(["task leader", "state leader", "two of three", "rolling restart"])
        fault = self._note("cluster", "", None)
        call: Callable[..., Awaitable[Any]] = asyncio.to_thread
        # If another fault has left the stream without a leader, a random server is killed.
        down: list[int] = []
        if action in ("task leader", "state leader"):
            name = stream if action == "task leader" else f"KV_{self._testbed.settings.state_bucket}"
            leader = await asyncio.to_thread(cluster.leader_of, name)
            down = [self._dice.choice(cluster.running) if leader is None else leader]
            seconds = self._dice.uniform(1, 6)
            fault.what = f"server {down[0]}, the leader of {name}, was killed and restarted after {seconds:.1f} s"
        elif action == "two of three":
            down = self._dice.sample(cluster.running, 2)
            seconds = self._dice.uniform(1, 2 * self._options.ack_wait)
            fault.what = f"servers {down[0]} and {down[1]} were killed and restarted after {seconds:.1f} s"
        else:
            fault.what = "all servers were restarted one by one"
            for number in list(cluster.running):
                await call(cluster.restart, number)
                with contextlib.suppress(DevServerError):
                    await call(cluster.wait_ready)
        if down:
            for number in down:
                await call(cluster.kill, number)
            await self._wait_and_perhaps_kill(seconds)
            for number in down:
                await call(cluster.restart, number)
        with contextlib.suppress(DevServerError):
            await call(cluster.wait_ready)
        fault.ended = time.monotonic()
