"""Runs an attack from its beginning to its judgement."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from nqnb.client import Client, connect
from nqnb.errors import DevServerError, NqnbError, ServerRefused
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.queue_streams import NOT_FOUND
from nqnb.protocol.names import CONSUMER
from nqnb.testing.chaos.evidence import Evidence, read_revisions
from nqnb.testing.chaos.faults import CLOCK_SECONDS, Faults
from nqnb.testing.chaos.judge import judge
from nqnb.testing.chaos.plan import ChaosOptions, plan_tasks
from nqnb.testing.chaos.report import ChaosReport, ChaosState, figures, tell
from nqnb.testing.chaos.testbed import Stage, Workforce
from nqnb.testing.chaos.workload import FarHand, Hand, Load, NearHand

_IN_FLIGHT = 96
_SETTLE_SECONDS = 45.0
"""Seconds, besides ten ack waits, that tasks have to end once nothing is broken any more."""
_WORKERS_TAKE_SECONDS = 60.0
_LOOK_SECONDS = 0.2
_LAG_PAUSE_SECONDS = 0.05
_LAG_LEAST_SECONDS = 0.2
_LAST_FAULTS = 8


async def run_chaos(options: ChaosOptions, on_change: Callable[[ChaosState], None] = lambda _: None) -> ChaosReport:
    """Attack, and judge.

    Args:
        options: what to attack, and how.
        on_change: called with how far it is, a few times a second.

    Raises:
        DevServerError: the servers or the workers do not start.
        NqnbError: the server cannot be used at all.
    """
    async with Stage.opened(options) as stage, contextlib.AsyncExitStack() as stack:
        attack = _Attack(options, stage, on_change)
        return await attack.run(stack)


class _Attack:
    """One attack."""

    def __init__(self, options: ChaosOptions, stage: Stage, on_change: Callable[[ChaosState], None]) -> None:
        self._options = options
        self._stage = stage
        self._on_change = on_change
        self._evidence = Evidence(options.ack_wait, begun=time.monotonic())
        self._state = ChaosState(tasks=options.tasks)
        dice = random.Random(f"clock {options.seed}")
        clock = dice.choice([CLOCK_SECONDS, -CLOCK_SECONDS])
        self._clocks = "clock" in options.faults
        self._client_clock, self._worker_clock = (clock, -clock) if self._clocks else (0.0, 0.0)
        orders = {
            "settings": stage.fields(),
            "queues": stage.queues,
            "concurrency": options.concurrency,
            "prelude": options.prelude,
        }
        places: list[dict[str, Any]] = [
            {
                "settings": {"url": stage.fields(place)["url"]},
                # The worker in the first place has the wrong clock.
                "clock": 0.0 if place else self._worker_clock,
            }
            for place in range(options.workers)
        ]
        self._workforce = Workforce(stage.folder, orders, places)
        self._load: Load | None = None
        self._faults: Faults | None = None
        self._far: FarHand | None = None

    async def run(self, stack: contextlib.AsyncExitStack) -> ChaosReport:
        """Attack, and judge."""
        options, stage, evidence = self._options, self._stage, self._evidence
        stack.push_async_callback(self._end_processes)
        nq = await stack.enter_async_context(connect(stage.settings))
        linked = await stack.enter_async_context(connect(stage.linked()))
        hands: list[Hand] = [NearHand(nq), NearHand(linked)]
        if self._clocks:
            far = self._far = FarHand(stage.fields(), self._client_clock, self._workforce.environment)
            stack.push_async_callback(far.stop)
            await far.start()
            hands.append(far)
        plans = list(plan_tasks(options, len(hands)))
        load = self._load = Load(plans, hands, stage.queues, _IN_FLIGHT, time.monotonic() + 60 * options.minutes)
        faults = self._faults = Faults(options, stage, self._workforce, load)
        helpers = [asyncio.ensure_future(self._show()), asyncio.ensure_future(self._watch_loop())]
        stack.push_async_callback(_cancel, *helpers)
        for place in range(options.workers):
            self._workforce.start(place)
        await self._until_workers_serve(nq)
        if self._clocks:
            number = self._workforce.number_at(0)
            faults.stand("clock", f"the clock of worker process {number} is {self._worker_clock:+.0f} s off", ())
            faults.stand("clock", f"the clock of a client is {self._client_clock:+.0f} s off", ())
        states = nq.backend.states
        if not isinstance(states, KeyValueStore):
            raise TypeError("the attack's states are in a bucket")
        unsubscribe = await states.overhear(load.hear)
        self._state.phase = "attacking"
        injecting = asyncio.ensure_future(faults.run())
        stack.push_async_callback(_cancel, injecting)
        await _first_error(load.run(lambda: None), injecting)
        await _cancel(injecting)
        self._state.phase = "healing"
        await faults.heal()
        self._state.phase = "waiting for every task to end"
        await self._until_settled(nq)
        with contextlib.suppress(NqnbError):
            await unsubscribe()
        evidence.left += await self._messages_left(nq)
        self._state.phase = "stopping the workers"
        evidence.left += await self._workforce.stop()
        if self._far is not None:
            await self._far.stop()
        evidence.left += await self._workforce.leftovers()
        self._state.phase = "reading what was stored"
        evidence.revisions, evidence.missing = await read_revisions(
            nq.backend.connection, stage.settings.state_bucket, stage.offset
        )
        evidence.submits, evidence.cancels = load.submits, load.cancels
        evidence.faults, evidence.lives = faults.seen, self._workforce.lives
        evidence.lines = await asyncio.to_thread(self._workforce.diaries)
        evidence.judged = time.monotonic()
        self._state.phase = "judging"
        self._tell_state()
        return await asyncio.to_thread(self._report)

    def _report(self) -> ChaosReport:
        evidence, options = self._evidence, self._options
        breaches = judge(evidence)
        good = sum(1 for each in evidence.submits if each.ended and not each.error)
        return ChaosReport(
            seed=options.seed,
            tasks=options.tasks,
            faults=options.faults,
            where=self._where(),
            submitted=len(evidence.submits),
            acknowledged=good,
            refused=len(evidence.submits) - good,
            seconds=time.monotonic() - evidence.begun,
            figures=figures(evidence),
            breaches=breaches,
            told=tell(evidence, breaches),
            revisions=sum(map(len, evidence.revisions.values())),
        )

    def _where(self) -> str:
        if self._stage.cluster is not None:
            return f"3 servers of its own, nats-server {self._stage.cluster.servers[0].version}"
        if self._stage.server is not None:
            return f"a server of its own, nats-server {self._stage.server.version}"
        return ", ".join(self._stage.settings.urls)

    async def _until_workers_serve(self, nq: Client) -> None:
        until = time.monotonic() + _WORKERS_TAKE_SECONDS
        serving = 0
        while serving < self._options.workers:
            # By presence entries, not `Client.workers`, so that a wrong clock among the workers shows later, not here.
            serving = len([entry async for entry in nq.backend.presence.entries()])
            ended = self._workforce.look()
            if ended or time.monotonic() > until:
                tails = [line for life in self._workforce.lives for line in self._workforce.log_tail(life.number)]
                why = "; ".join(ended) or f"{serving} of {self._options.workers} serve"
                raise DevServerError(f"the attack's workers did not start: {why}\n" + "\n".join(tails))
            await asyncio.sleep(0.1)

    async def _until_settled(self, nq: Client) -> None:
        """Wait until every task has ended and the queues are empty; what is left is judged."""
        until = time.monotonic() + _SETTLE_SECONDS + 10 * self._options.ack_wait
        while time.monotonic() < until:
            with contextlib.suppress(NqnbError):
                if not any(not each.status.terminal for each in await nq.tasks()) and not await self._messages_left(nq):
                    return
            for said in self._workforce.look():
                self._evidence.left.append(said)
            await asyncio.sleep(0.5)

    async def _messages_left(self, nq: Client) -> list[str]:
        """What is still in the queues, in words."""
        said = []
        connection = nq.backend.connection
        for queue in self._stage.queues.values():
            try:
                name = (await nq.backend.ensure_queue(queue)).tasks
                state = (await connection.insist(partial(connection.api, f"STREAM.INFO.{name}")))["state"]
                consumer = await connection.insist(partial(connection.api, f"CONSUMER.INFO.{name}.{CONSUMER}"))
            except ServerRefused as error:
                if error.err_code not in NOT_FOUND:
                    raise
                continue
            if state["messages"]:
                said.append(f"{state['messages']} messages are left in queue {queue!r}")
            if consumer["num_ack_pending"]:
                said.append(f"{consumer['num_ack_pending']} messages of queue {queue!r} are unacknowledged")
        return said

    async def _end_processes(self) -> None:
        await self._workforce.kill_all()
        await asyncio.to_thread(self._workforce.end_leftovers)

    async def _watch_loop(self) -> None:
        """Note when this loop, which carries the links, stood still."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_LAG_PAUSE_SECONDS)
            now = time.monotonic()
            if now - last - _LAG_PAUSE_SECONDS > _LAG_LEAST_SECONDS:
                self._evidence.lags.append((last, now))
            last = now

    async def _show(self) -> None:
        while True:
            self._tell_state()
            await asyncio.sleep(_LOOK_SECONDS)

    def _tell_state(self) -> None:
        state, load, faults = self._state, self._load, self._faults
        state.seconds = time.monotonic() - self._evidence.begun
        if load is not None and faults is not None:
            state.submitted = len(load.submits)
            state.refused = sum(1 for each in load.submits if each.error)
            state.cancels = len(load.cancels)
            state.ended = Counter({status.label: count for status, count in load.ended.items()})
            state.faults = Counter(fault.kind for fault in faults.seen)
            state.workers = sum(not life.died for life in self._workforce.lives)
            recent = [fault for fault in faults.seen if not fault.harmless][-_LAST_FAULTS:]
            state.last_faults = [
                (fault.begun - self._evidence.begun, fault.what, bool(fault.ended)) for fault in recent
            ]
        self._on_change(state)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _first_error(work: Any, beside: asyncio.Future[None]) -> None:
    """Await work to its end; an error of what goes on beside it ends it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, beside}, return_when=asyncio.FIRST_COMPLETED)
        if beside.done():
            beside.result()
        await task
    finally:
        await _cancel(task)
