"""Schedules on a real server: definitions, firings, missed times, and entries that cannot be read."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import nqnb
from nqnb import ScheduleExists, UnknownSchedule
from nqnb.protocol.recurring import MOST_MISSED, Missed, ScheduleEntry, fire, firing_id, read_schedule
from nqnb.protocol.wire import TaskMessage
from nqnb.recurrence import Recurrence

pytestmark = pytest.mark.anyio

QUEUE = "report"
HOUR = 3_600


@pytest.fixture(scope="module")
def shared_server() -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
def settings(shared_server: nqnb.DevServer) -> nqnb.Settings:
    return nqnb.Settings(shared_server.url, ack_wait=1.0, retry_for=5.0)


async def late(nq: nqnb.Client, name: str, seconds: float) -> ScheduleEntry:
    """Change a schedule so that its next time was so many seconds ago, as if no worker had served its queue since."""
    entry, revision = await read_schedule(nq.backend, name)
    back = math.floor(await nq.backend.read_now() - seconds)
    when = msgspec.structs.replace(entry.when, anchor=back - entry.when.interval)
    entry = msgspec.structs.replace(entry, next=back, when=when if when.interval else entry.when)
    await nq.backend.recurring.update(name, entry.encode(), revision)
    return entry


async def firings(nq: nqnb.Client, name: str) -> list[str]:
    return sorted(task.id for task in await nq.tasks() if task.group == name)


async def test_a_definition_is_stored_once(nq: nqnb.Client) -> None:
    def again(cron: str = "0 7 * * mon-fri", **changed: Any) -> Any:
        options: dict[str, Any] = {"timezone": "Europe/Berlin", "name": "nightly", "retry": 2, "timeout": 1.5} | changed
        return nq.every(cron, QUEUE, {"a": 1}, **options)

    made = await again()
    assert (made.name, made.queue, made.payload, made.missed) == ("nightly", QUEUE, b'{"a":1}', "once")
    assert (made.when, made.retry, made.timeout) == ("0 7 * * mon-fri Europe/Berlin", 2, 2)
    assert made.next_at is not None
    assert made.written_at is not None
    assert made.next_at > made.written_at
    assert made.last_at is None
    assert await again() == made
    assert [info for info in await nq.schedules() if info.name == "nightly"] == [made]
    for changed in ({"retry": 3}, {"serial": "a"}, {"missed": "all"}, {"timezone": None}, {"cron": "1 7 * * *"}):
        with pytest.raises(ScheduleExists, match="'nightly' cannot be created: it already exists") as caught:
            await again(**changed)
        assert caught.value.name == "nightly"
    assert await again() == made
    assert (
        await nq.every(made.cron, QUEUE, b'{ "a": 1 }', name="nightly", timezone=made.timezone, retry=2, timeout=2)
        == made
    )

    await nq.pause_schedule("nightly")
    changed_info = await again(retry=3, replace=True)
    assert (changed_info.retry, changed_info.paused, changed_info.next_at) == (3, True, None)
    resumed = await nq.resume_schedule("nightly")
    assert (resumed.paused, resumed.next_at) == (False, made.next_at)
    await nq.remove_schedule("nightly")
    for use in (nq.remove_schedule, nq.pause_schedule, nq.resume_schedule, nq.run_schedule):
        with pytest.raises(UnknownSchedule, match="'nightly' is unknown"):
            await use("nightly")
    assert (await again()).retry == 2


async def test_an_interval_begins_with_the_first_call(nq: nqnb.Client) -> None:
    made = await nq.every(minutes=5, queue=QUEUE, name="poll")
    assert made.next_at is not None
    assert made.written_at is not None
    assert 300 <= (made.next_at - made.written_at).total_seconds() <= 301
    assert await nq.every(seconds=300, queue=QUEUE, name="poll") == made
    other = await nq.every(minutes=5, queue=QUEUE, payload="other", name="poll", replace=True)
    assert (other.payload, other.next_at) == (b'"other"', made.next_at)


async def test_clients_that_define_a_schedule_at_once_agree(nq: nqnb.Client) -> None:
    made = await asyncio.gather(*(nq.every(hours=1, queue=QUEUE, name="together") for _ in range(10)))
    assert len({info.next_at for info in made}) == 1
    different = (nq.every(hours=1, queue=QUEUE, payload=number, name="one") for number in range(10))
    outcomes = Counter(map(type, await asyncio.gather(*different, return_exceptions=True)))
    assert outcomes == {nqnb.ScheduleInfo: 1, ScheduleExists: 9}


@pytest.mark.parametrize(
    ("arguments", "named", "error", "said"),
    [
        (("0 7 * * *", QUEUE), {"name": "a b"}, nqnb.BadInput, "name='a b' is invalid"),
        (("0 7 * * *", QUEUE), {"name": ""}, nqnb.BadInput, "name='' is invalid"),
        (("0 7 * * *", QUEUE), {"name": 7}, nqnb.BadInput, "name=7 is invalid"),
        (("0 7 * * *",), {"name": "a"}, nqnb.InvalidQueueName, "queue name None"),
        (("0 7 * * *", "a/b"), {"name": "a"}, nqnb.InvalidQueueName, "queue name 'a/b'"),
        ((QUEUE,), {"name": "a"}, nqnb.BadInput, "wrong number of fields"),
        (("0 7 * * *", QUEUE, object()), {"name": "a"}, nqnb.UnencodableValue, "payload"),
        (("0 7 * * *", QUEUE, b"x" * 2_000_000), {"name": "a"}, nqnb.PayloadTooLarge, "too large"),
        (("0 7 * * *", QUEUE), {"name": "a", "missed": "twice"}, nqnb.BadInput, "missed='twice' is invalid"),
        (("0 7 * * *", QUEUE), {"name": "a", "retry": -1}, nqnb.BadInput, "retry=-1"),
        (("0 7 * * *", QUEUE), {"name": "a", "timeout": 0}, nqnb.BadInput, "timeout=0"),
        (("0 7 * * *", QUEUE), {"name": "a", "serial": ""}, nqnb.BadInput, "serial=''"),
        (("0 7 * * *", QUEUE), {"name": "a", "replace": "yes"}, nqnb.BadInput, "replace='yes'"),
    ],
)
async def test_invalid_arguments_are_refused(
    nq: nqnb.Client, arguments: tuple[Any, ...], named: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await nq.every(*arguments, **named)
    assert "a" not in [info.name for info in await nq.schedules()]


async def test_many_workers_fire_once(nq: nqnb.Client) -> None:
    await nq.every(hours=1, queue=QUEUE, payload=[1], name="busy", retry=1, serial="alone")
    assert await fire(nq.backend, "busy", "w") is not None
    assert await firings(nq, "busy") == [], "it is not due"
    entry = await late(nq, "busy", 5)
    await asyncio.gather(*(fire(nq.backend, "busy", f"w{number}") for number in range(20)))
    assert await firings(nq, "busy") == [firing_id("busy", entry.next)]
    (task,) = [task for task in await nq.tasks(QUEUE) if task.group == "busy"]
    stored = await nq.backend.states.get(task.id)
    assert stored is not None
    assert TaskMessage.decode(stored.value).serial == "alone"
    assert (task.payload, task.max_retry, task.status) == (b"[1]", 1, nqnb.Status.PENDING)
    (info,) = [info for info in await nq.schedules() if info.name == "busy"]
    assert info.last_at is not None
    assert info.last_at.timestamp() == entry.next
    assert info.next_at is not None
    assert info.next_at.timestamp() == entry.next + HOUR

    # A worker that died after the submission, before it moved the schedule on: the task is not submitted again.
    await nq.cancel(task.id)
    moved, revision = await read_schedule(nq.backend, "busy")
    await nq.backend.recurring.update("busy", entry.encode(), revision)
    await fire(nq.backend, "busy", "w")
    assert await firings(nq, "busy") == [task.id]
    assert (await nq.status(task.id)) is nqnb.Status.DELETED
    assert (await read_schedule(nq.backend, "busy"))[0].next == moved.next

    # Two tasks by hand, and a removed schedule leaves its tasks.
    for _ in range(2):
        await nq.run_schedule("busy")
    await nq.remove_schedule("busy")
    assert await fire(nq.backend, "busy", "w") is None
    assert len(await firings(nq, "busy")) == 3


@pytest.mark.parametrize(
    ("missed", "lag", "expected"),
    [
        ("skip", 30, 1),
        ("skip", HOUR / 2, 0),
        ("once", HOUR / 2, 1),
        ("once", 5.5 * HOUR, 1),
        ("all", 5.5 * HOUR, 6),
        ("all", 1_000 * HOUR, MOST_MISSED),
    ],
)
async def test_missed_times(
    nq: nqnb.Client, missed: Missed, lag: float, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{missed}-{lag:.0f}"
    await nq.every(hours=1, queue=QUEUE, name=name, missed=missed)
    entry = await late(nq, name, lag)
    moved = await fire(nq.backend, name, "w")
    last = entry.next + lag // HOUR * HOUR
    assert await firings(nq, name) == [firing_id(name, last - HOUR * back) for back in reversed(range(expected))]
    assert moved is not None
    assert (moved.next, moved.last) == (last + HOUR, last if expected else 0)
    assert ("only the latest 100 of the missed tasks" in caplog.text) == (expected == MOST_MISSED)


@pytest.mark.parametrize("when", [{"minutes": 5}, {"cron": "*/5 * * * *"}], ids=str)
async def test_a_next_time_of_a_clock_that_was_ahead_is_computed_again(
    nq: nqnb.Client, when: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    name = f"ahead-{next(iter(when))}"
    await nq.every(queue=QUEUE, name=name, **when)
    entry, revision = await read_schedule(nq.backend, name)
    assert not entry.is_ahead(await nq.backend.read_now())
    next_time = entry.when.next_after(entry.next + 30 * 24 * HOUR)
    fired = msgspec.structs.replace(entry, next=next_time, last=entry.next)
    await nq.backend.recurring.update(name, fired.encode(), revision)
    moved = await fire(nq.backend, name, "w")
    now = await nq.backend.read_now()
    assert moved is not None
    assert now - 1 < moved.next <= now + 301
    assert (await read_schedule(nq.backend, name))[0] == moved == msgspec.structs.replace(fired, next=moved.next)
    assert await fire(nq.backend, name, "w") == moved
    assert await firings(nq, name) == [], "nothing is due"
    assert caplog.text.count("was computed while the server's clock was ahead") == 1


async def test_times_that_pass_during_a_pause_are_skipped(nq: nqnb.Client) -> None:
    await nq.every("* * * * *", QUEUE, name="resting", missed="all")
    await nq.pause_schedule("resting")
    await late(nq, "resting", HOUR)
    await fire(nq.backend, "resting", "w")
    resumed = await nq.resume_schedule("resting")
    await fire(nq.backend, "resting", "w")
    assert await firings(nq, "resting") == []
    assert resumed.next_at is not None
    assert resumed.next_at.timestamp() > nq.backend.earliest_now() - 1


async def test_a_change_during_a_firing_is_kept(nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker moves the schedule on by compare-and-set."""
    await nq.every(hours=1, queue=QUEUE, name="changed")
    await late(nq, "changed", 1)
    update = nq.backend.recurring.update

    async def paused_meanwhile(*arguments: Any) -> int:
        monkeypatch.undo()
        await nq.pause_schedule("changed")
        return await update(*arguments)

    monkeypatch.setattr(nq.backend.recurring, "update", paused_meanwhile)
    await fire(nq.backend, "changed", "w")
    assert len(await firings(nq, "changed")) == 1
    assert (await read_schedule(nq.backend, "changed"))[0].paused


BROKEN = {
    "not-json": b"{",
    "other-name": ScheduleEntry(name="x", queue=QUEUE, when=Recurrence(interval=60)).encode(),
    "no-times": ScheduleEntry(name="no-times", queue=QUEUE, when=Recurrence()).encode(),
    "bad-cron": ScheduleEntry(name="bad-cron", queue=QUEUE, when=Recurrence(cron="x")).encode(),
    "bad-zone": ScheduleEntry(name="bad-zone", queue=QUEUE, when=Recurrence(cron="* * * * *", timezone="?")).encode(),
    "bad-queue": ScheduleEntry(name="bad-queue", queue="a/b", when=Recurrence(interval=60)).encode(),
    "far-next": ScheduleEntry(
        name="far-next", queue=QUEUE, when=Recurrence(cron="0 0 1 1 *"), next=253_402_214_000.0
    ).encode(),
}


async def test_an_entry_that_cannot_be_read_hides_no_other(nq: nqnb.Client, caplog: pytest.LogCaptureFixture) -> None:
    await nq.every(hours=1, queue=QUEUE, name="good")
    for name, data in BROKEN.items():
        await nq.backend.recurring.put(name, data)
    found = [info.name for info in await nq.schedules()]
    assert "good" in found
    assert not BROKEN.keys() & set(found)
    assert f"skipped {len(BROKEN)} entries with invalid data" in caplog.text
    for name in BROKEN:
        for use in (nq.pause_schedule, nq.run_schedule):
            with pytest.raises(nqnb.MalformedMessage):
                await use(name)
        with pytest.raises(nqnb.MalformedMessage):
            await nq.every(hours=1, queue=QUEUE, name=name)
    assert (await nq.every(hours=1, queue=QUEUE, name="not-json", replace=True)).interval == HOUR
    for name in BROKEN:
        await nq.remove_schedule(name)
