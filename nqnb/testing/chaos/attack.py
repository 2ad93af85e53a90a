"""Run an attack, from starting the servers to judging the results."""

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
from nqnb.jetstream.server_errors import NOT_FOUND
from nqnb.protocol.names import CONSUMER
from nqnb.testing.chaos.evidence import Evidence, firings_of, read_revisions
from nqnb.testing.chaos.faults import CLOCK_SECONDS, Faults
from nqnb.testing.chaos.judge import judge
from nqnb.testing.chaos.plan import FIRING_PERIOD_SECONDS, LIMITS, SCHEDULE, ChaosOptions, Kind, TaskPlan, plan_tasks
from nqnb.testing.chaos.report import ChaosReport, ChaosState, explain, figures
from nqnb.testing.chaos.testbed import ChaosWorkers, Testbed
from nqnb.testing.chaos.workload import LocalClient, RemoteClient, TaskClient, Workload

_MAX_OPEN_TASKS = 96
_END_TIMEOUT_SECONDS = 45.0
"""After the last fault, all tasks must end within this many seconds plus ten ack waits."""
_WORKER_START_TIMEOUT_SECONDS = 60.0
_STATE_PAUSE_SECONDS = 0.2
_LAG_PAUSE_SECONDS = 0.05
_MIN_LAG_SECONDS = 0.2
_SHOWN_FAULTS = 8


async def run_chaos(options: ChaosOptions, on_change: Callable[[ChaosState], None] = lambda _: None) -> ChaosReport:
    """Run an attack, and report which rules nqnb broke.

    Args:
        options: the options of the attack.
        on_change: a callback that is called with the progress a few times per second.

    Raises:
        DevServerError: the servers or the workers did not start.
        NqnbError: the server cannot be used.
    """
    async with Testbed.opened(options) as testbed, contextlib.AsyncExitStack() as stack:
        attack = _Attack(options, testbed, on_change)
        return await attack.run(stack)


class _Attack:
    def __init__(self, options: ChaosOptions, testbed: Testbed, on_change: Callable[[ChaosState], None]) -> None:
        self._options = options
        self._testbed = testbed
        self._on_change = on_change
        self._evidence = Evidence(options.ack_wait, begun=time.monotonic())
        self._state = ChaosState(tasks=options.tasks)
        dice = random.Random(f"clock {options.seed}")
        clock = dice.choice([CLOCK_SECONDS, -CLOCK_SECONDS])
        self._clocks = "clock" in options.faults
        self._client_clock, self._worker_clock = (clock, -clock) if self._clocks else (0.0, 0.0)
        orders = {
            "settings": testbed.fields(),
            "queues": testbed.queues,
            "concurrency": options.concurrency,
            "prelude": options.prelude,
        }
        places: list[dict[str, Any]] = [
            {
                "settings": {"url": testbed.fields(place)["url"]},
                # The clock of the worker in slot 0 is wrong.
                "clock": 0.0 if place else self._worker_clock,
            }
            for place in range(options.workers)
        ]
        self._workers = ChaosWorkers(testbed.folder, orders, places)
        self._workload: Workload | None = None
        self._faults: Faults | None = None
        self._remote: RemoteClient | None = None

    async def run(self, stack: contextlib.AsyncExitStack) -> ChaosReport:
        options, testbed, evidence = self._options, self._testbed, self._evidence
        stack.push_async_callback(self._end_processes)
        nq = await stack.enter_async_context(connect(testbed.settings))
        linked = await stack.enter_async_context(connect(testbed.linked()))
        clients: list[TaskClient] = [LocalClient(nq), LocalClient(linked)]
        if self._clocks:
            remote = self._remote = RemoteClient(testbed.fields(), self._client_clock, self._workers.environment)
            stack.push_async_callback(remote.stop)
            await remote.start()
            clients.append(remote)
        plans = list(plan_tasks(options, len(clients)))
        deadline = time.monotonic() + 60 * options.minutes
        workload = self._workload = Workload(plans, clients, testbed.queues, _MAX_OPEN_TASKS, deadline)
        faults = self._faults = Faults(options, testbed, self._workers, workload)
        for kind, limits in LIMITS.items():
            queue = testbed.queues[kind.value]
            await nq.backend.ensure_queue(queue)
            await nq.limit_queue(queue, rate=limits.rate or None, concurrency=limits.concurrency or None)
        helpers = [asyncio.ensure_future(self._keep_showing()), asyncio.ensure_future(self._watch_loop())]
        stack.push_async_callback(_cancel, *helpers)
        for place in range(options.workers):
            self._workers.start(place)
        await self._until_workers_serve(nq)
        if self._clocks:
            number = self._workers.number_at(0)
            faults.note_standing(
                "clock", f"the clock of worker process {number} is off by {self._worker_clock:+.0f} s", ()
            )
            faults.note_standing("clock", f"the clock of a client is off by {self._client_clock:+.0f} s", ())
        states = nq.backend.states
        if not isinstance(states, KeyValueStore):
            raise TypeError(f"the attack cannot start: the store must be a KeyValueStore, got {type(states).__name__}")
        unsubscribe = await states.overhear(workload.hear)
        recurring = TaskPlan(0, Kind.COROUTINE, 0.05)
        schedule = await nq.every(
            seconds=FIRING_PERIOD_SECONDS,
            queue=testbed.queues[recurring.kind.value],
            payload=recurring.payload,
            name=SCHEDULE,
            missed="all",
        )
        self._state.phase = "attacking"
        injecting = asyncio.ensure_future(faults.run())
        stack.push_async_callback(_cancel, injecting)
        await _first_error(workload.run(), injecting)
        await _cancel(injecting)
        self._state.phase = "healing"
        await faults.heal()
        evidence.firings = firings_of(schedule, await nq.pause_schedule(SCHEDULE))
        self._state.phase = "waiting for every task to end"
        await self._until_settled(nq)
        with contextlib.suppress(NqnbError):
            await unsubscribe()
        evidence.left += await self._messages_left(nq)
        self._state.phase = "stopping the workers"
        evidence.left += await self._workers.stop()
        if self._remote is not None:
            evidence.crashes += await self._remote.stop()
        evidence.left += await self._workers.leftovers()
        self._state.phase = "reading the stored revisions"
        evidence.revisions, evidence.missing = await read_revisions(
            nq.backend.connection, testbed.settings.state_bucket, testbed.offset
        )
        evidence.crashes += [*self._workers.crashes, *workload.crashes]
        evidence.submits, evidence.cancels = workload.submits, workload.cancels
        evidence.faults, evidence.lives = faults.seen, self._workers.lives
        evidence.lines = await asyncio.to_thread(self._workers.diaries)
        evidence.judged = time.monotonic()
        self._state.phase = "judging"
        self._show_state()
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
            told=explain(evidence, breaches),
            revisions=sum(map(len, evidence.revisions.values())),
            lost_writes=evidence.lost_writes,
        )

    def _where(self) -> str:
        if self._testbed.cluster is not None:
            return f"3 servers started for the attack, nats-server {self._testbed.cluster.servers[0].version}"
        if self._testbed.server is not None:
            return f"a server started for the attack, nats-server {self._testbed.server.version}"
        return ", ".join(self._testbed.settings.urls)

    async def _until_workers_serve(self, nq: Client) -> None:
        deadline = time.monotonic() + _WORKER_START_TIMEOUT_SECONDS
        serving = 0
        while serving < self._options.workers:
            # Presence entries are counted because, unlike `Client.workers`, they do not depend on the workers' clocks.
            serving = len([entry async for entry in nq.backend.presence.entries()])
            self._workers.note_crashes()
            ended = self._workers.crashes
            if ended or time.monotonic() > deadline:
                tails = [line for life in self._workers.lives for line in self._workers.log_tail(life.number)]
                why = "; ".join(ended) or f"expected {self._options.workers} serving workers, got {serving}"
                raise DevServerError(
                    f"the attack's workers did not start: {why}. Check their logs:\n" + "\n".join(tails)
                )
            await asyncio.sleep(0.1)

    async def _until_settled(self, nq: Client) -> None:
        """Wait until every task has ended and the queues are empty, or until the time limit is reached."""
        deadline = time.monotonic() + _END_TIMEOUT_SECONDS + 10 * self._options.ack_wait
        while time.monotonic() < deadline:
            with contextlib.suppress(NqnbError):
                if all(task.status.terminal for task in await nq.tasks()) and not await self._messages_left(nq):
                    return
            self._workers.note_crashes()
            await asyncio.sleep(0.5)

    async def _messages_left(self, nq: Client) -> list[str]:
        """Return descriptions of the messages that are still in the queues."""
        said = []
        connection = nq.backend.connection
        for queue in self._testbed.queues.values():
            try:
                name = (await nq.backend.ensure_queue(queue)).tasks
                state = (await connection.insist(partial(connection.api, f"STREAM.INFO.{name}")))["state"]
                consumer = await connection.insist(partial(connection.api, f"CONSUMER.INFO.{name}.{CONSUMER}"))
            except ServerRefused as error:
                if error.err_code not in NOT_FOUND:
                    raise
                continue
            if state["messages"]:
                said.append(f"messages left in queue {queue!r}: {state['messages']}")
            if consumer["num_ack_pending"]:
                said.append(f"unacknowledged messages in queue {queue!r}: {consumer['num_ack_pending']}")
        return said

    async def _end_processes(self) -> None:
        await self._workers.kill_all()
        await asyncio.to_thread(self._workers.end_leftovers)

    async def _watch_loop(self) -> None:
        """Record the periods during which this event loop, and therefore every link, was blocked."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_LAG_PAUSE_SECONDS)
            now = time.monotonic()
            if now - last - _LAG_PAUSE_SECONDS > _MIN_LAG_SECONDS:
                self._evidence.lags.append((last, now))
            last = now

    async def _keep_showing(self) -> None:
        while True:
            self._show_state()
            await asyncio.sleep(_STATE_PAUSE_SECONDS)

    def _show_state(self) -> None:
        state, workload, faults = self._state, self._workload, self._faults
        state.seconds = time.monotonic() - self._evidence.begun
        if workload is not None and faults is not None:
            state.submitted = len(workload.submits)
            state.refused = sum(1 for each in workload.submits if each.error)
            state.cancels = len(workload.cancels)
            state.ended = Counter({status.label: count for status, count in workload.ended.items()})
            state.faults = Counter(fault.kind for fault in faults.seen)
            state.workers = sum(not life.died for life in self._workers.lives)
            recent = [fault for fault in faults.seen if not fault.harmless][-_SHOWN_FAULTS:]
            state.last_faults = [
                (fault.begun - self._evidence.begun, fault.what, bool(fault.ended)) for fault in recent
            ]
        self._on_change(state)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _first_error(work: Any, beside: asyncio.Future[None]) -> None:
    """Wait for ``work`` to finish. If ``beside`` fails first, cancel ``work`` and raise the error of ``beside``."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, beside}, return_when=asyncio.FIRST_COMPLETED)
        if beside.done():
            beside.result()
        await task
    finally:
        await _cancel(task)
