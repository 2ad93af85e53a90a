"""Lengths of time, dates, states and names are checked alike wherever a caller gives them."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from helpers.bad_values import Broken

import nqnb
from nqnb import BadInput, NotSubmitted, Status, UnknownQueue, UnknownTask, WaitTimeout
from nqnb.inputs import check_seconds
from nqnb.notebook.session import Session

pytestmark = pytest.mark.anyio


class Queue(str, enum.Enum):
    SLOW = "slow-queue"


@pytest.fixture(scope="module")
def server() -> Iterator[nqnb.DevServer]:
    """One server for all that is here."""
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    async with nqnb.connect(settings) as client:
        yield client


@pytest.fixture
async def ended(nq: nqnb.Client, settings: nqnb.Settings) -> nqnb.Task:
    """A task that has completed."""
    worker = nqnb.Worker(settings)
    worker.handler("done")(lambda job: "the result")
    async with worker:
        task = await nq.submit("done")
        assert await task.wait(timeout=20) is Status.COMPLETED
    return task


NOT_LENGTHS = ["5", True, None, b"5", [5], pd.NaT, np.timedelta64("NaT"), np.timedelta64(5), np.bool_(True), Broken()]
OUT_OF_RANGE = [math.nan, math.inf, -1, 10**19, 10**400, timedelta.max, timedelta(seconds=-1), np.float32("nan")]


def refused(error: BadInput, name: str) -> None:
    """It is one short line that has the name and says what to pass."""
    text = str(error)
    assert name in text
    assert "\n" not in text
    assert len(text) < 400
    assert re.search(" (Pass|Use|Give|must) ", text)


class TestDurations:
    @pytest.mark.parametrize(
        ("given", "seconds"),
        [
            (5, 5.0),
            (0.5, 0.5),
            (timedelta(minutes=1), 60.0),
            (np.int64(5), 5.0),
            (np.float32(0.5), 0.5),
            (np.timedelta64(1500, "ms"), 1.5),
            (pd.Timedelta("2min"), 120.0),
            (Fraction(1, 2), 0.5),
        ],
    )
    def test_every_kind_of_duration_is_converted_to_seconds(self, given: object, seconds: float) -> None:
        found = check_seconds("wait", given)
        assert (found, type(found)) == (seconds, float)

    @pytest.mark.parametrize("given", [*NOT_LENGTHS, *OUT_OF_RANGE], ids=lambda value: type(value).__name__)
    def test_other_values_are_refused(self, given: object) -> None:
        with pytest.raises(BadInput) as caught:
            check_seconds("wait", given)
        refused(caught.value, "wait=")

    @pytest.mark.parametrize("given", OUT_OF_RANGE, ids=str)
    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("ack_wait", lambda value: nqnb.Worker(ack_wait=value)),
            ("retry_for", lambda value: nqnb.Settings(retry_for=value)),
            ("request_timeout", lambda value: nqnb.Settings(request_timeout=value)),
            ("connect_timeout", lambda value: nqnb.Settings(connect_timeout=value)),
            ("retention", lambda value: nqnb.Settings(retention=value)),
            ("shutdown_timeout", lambda value: nqnb.Worker(shutdown_timeout=value)),
            ("grace", lambda value: nqnb.Worker().handler("q", grace=value)(lambda job: None)),
            ("first", lambda value: nqnb.Backoff(first=value)),
            ("most", lambda value: nqnb.Backoff(most=value)),
        ],
    )
    def test_constructors_refuse_invalid_durations(
        self, name: str, make: Callable[[Any], object], given: object
    ) -> None:
        with pytest.raises(BadInput) as caught:
            make(given)
        refused(caught.value, f"{name}=")

    @pytest.mark.parametrize("given", [each for each in [*NOT_LENGTHS, *OUT_OF_RANGE] if each is not None], ids=type)
    async def test_every_call_refuses_invalid_durations(self, nq: nqnb.Client, given: Any) -> None:
        task = await nq.submit("lengths")
        calls: dict[str, Callable[[], Any]] = {
            "timeout": lambda: task.wait(given),
            "timeout=": lambda: task.result(timeout=given),
            "wait": lambda: task.cancel(wait=given),
            "older_than": lambda: nq.prune(given),
            "wait=": lambda: nq.delete_queue("lengths", force=True, wait=given),
            "timeout =": lambda: nq.submit("lengths", timeout=given),
        }
        for name, call in calls.items():
            with pytest.raises(BadInput) as caught:
                await call()
            refused(caught.value, name.rstrip(" ="))
        assert await task.status() is Status.PENDING  # nothing was done before the refusal

    def test_a_timedelta_is_accepted_everywhere(self) -> None:
        minute = timedelta(minutes=1)
        settings = nqnb.Settings(ack_wait=minute, retry_for=minute, retention=minute)  # type: ignore[arg-type]  # fields
        assert (settings.ack_wait, settings.retry_for, settings.retention_seconds) == (60.0, 60.0, 60.0)
        worker = nqnb.Worker(shutdown_timeout=minute)
        worker.handler("q", grace=minute, backoff=nqnb.Backoff(minute, minute))(lambda job: None)
        assert (worker.shutdown_timeout, worker.handlers["q"].grace) == (60.0, 60.0)
        assert worker.handlers["q"].backoff.delay(1, draw=1) == 60.0


class TestWaits:
    async def test_of_zero_seconds_return_if_the_task_has_ended(self, ended: nqnb.Task) -> None:
        for nothing in (0, 0.0, timedelta(0), 1e-9, np.float64(0)):
            assert await ended.wait(nothing) is Status.COMPLETED
            assert await ended.result(timeout=nothing) == "the result"

    async def test_of_zero_seconds_time_out_if_the_task_has_not_ended(self, nq: nqnb.Client) -> None:
        task = await nq.submit("waits")
        for nothing in (0, timedelta(0), 1e-9):
            with pytest.raises(WaitTimeout, match="did not finish within"):
                await task.wait(nothing)
        with pytest.raises(UnknownTask):
            await nq.wait("nobody", 0)

    async def test_of_zero_seconds_report_a_closed_connection(self, nq: nqnb.Client) -> None:
        async with nqnb.connect(nq.backend.connection.settings) as other:
            await other.backend.connection.close()
            for nothing in (0, 1e-9):
                with pytest.raises(nqnb.ConnectionFailed):
                    await other.wait("nobody", nothing)

    async def test_accept_timedeltas(self, nq: nqnb.Client) -> None:
        task = await nq.submit("waits")
        with pytest.raises(WaitTimeout, match=r"within 0.05 s"):
            await task.wait(timedelta(milliseconds=50))
        assert (await task.cancel(wait=timedelta(seconds=5))).status is Status.DELETED


class TestMoments:
    BAD = (
        datetime.min,
        datetime.max,
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))),
        datetime(1500, 1, 1),
        datetime(2262, 1, 1, tzinfo=timezone.utc),
        timedelta.max,
        timedelta.min,
        pd.NaT,
    )

    @pytest.mark.parametrize("name", ["deadline", "process_at"])
    @pytest.mark.parametrize("moment", BAD, ids=str)
    async def test_beyond_the_servers_range_are_refused(self, nq: nqnb.Client, name: str, moment: Any) -> None:
        with pytest.raises(BadInput, match=f"{name}=.* the year must be between 1970 and 2261") as caught:
            await nq.submit("moments", **{name: moment})
        refused(caught.value, name)

    async def test_of_pandas_are_accepted(self, nq: nqnb.Client) -> None:
        task = await nq.submit(
            "moments", process_at=pd.Timestamp("2030-01-01", tz="UTC"), deadline=pd.Timedelta("9999D")
        )
        assert (await task.fetch()).process_at == "2030-01-01T00:00:00.000000Z"
        await task.cancel()


class TestStates:
    async def test_are_accepted_as_members_labels_and_numbers(self, nq: nqnb.Client) -> None:
        task = await nq.submit("states")
        await (await nq.submit("states")).cancel()
        pending: list[Any] = [Status.PENDING, "pending", "PENDING", 0, np.int64(0), np.str_("pending"), ["pending"]]
        for state in [*pending, {0, "failed"}]:
            assert [each.id for each in await nq.tasks("states", state)] == [task.id]
        states: Iterator[str | int] = iter([0, "deleted"])
        assert len(await nq.tasks("states", states)) == 2
        assert await nq.tasks("states", []) == []

    @pytest.mark.parametrize("state", ["faild", "", "fail ed", 17, -1, True, 2.0, b"failed", [None], Broken(), [[2]]])
    async def test_other_values_are_refused_with_the_choices(self, nq: nqnb.Client, state: Any) -> None:
        with pytest.raises(BadInput, match=r"The states are pending, .*, deleted, scheduled"):
            await nq.tasks(status=state)

    async def test_a_misspelt_state_gets_a_suggestion(self, nq: nqnb.Client) -> None:
        with pytest.raises(
            BadInput, match=r"status 'faild' is invalid: there is no such state. Did you mean 'failed'\?"
        ):
            await nq.tasks(status="faild")


class TestQueues:
    async def test_an_unknown_queue_gets_a_suggestion(self, nq: nqnb.Client) -> None:
        await nq.submit("resize")
        for call in (nq.tasks("rezise"), nq.prune(0, "rezise"), nq.pause("rezise"), nq.purge_queue("rezise")):
            with pytest.raises(UnknownQueue, match=r"'rezise' does not exist.* Did you mean 'resize'\?") as caught:
                await call
            assert caught.value.queue == "rezise"

    async def test_an_empty_queue_has_no_tasks(self, nq: nqnb.Client) -> None:
        await nq.purge_queue((await nq.submit("empty")).queue)
        await nq.prune(0, "empty")
        assert await nq.tasks("empty") == []

    async def test_a_deleted_queue_still_lists_its_kept_tasks(self, nq: nqnb.Client) -> None:
        task = await nq.submit("removed")
        await nq.delete_queue("removed", force=True)
        assert [each.id for each in await nq.tasks("removed")] == [task.id]
        assert await nq.tasks("removed", "failed") == []
        assert (await nq.prune(0, "removed", dry_run=True)).entries == 1

    @pytest.mark.parametrize("name", [Queue.SLOW, np.str_("slow-queue"), type("Name", (str,), {})("slow-queue")])
    async def test_names_and_ids_become_plain_strings(self, nq: nqnb.Client, name: Any) -> None:
        task = await nq.submit(name, id=type(name)("slow-queue") if type(name) is not Queue else name)
        try:
            assert (task.id, type(task.id), task.queue, type(task.queue)) == ("slow-queue", str, "slow-queue", str)
            assert (await nq.fetch(name)).queue == "slow-queue"
            assert [each.id for each in await nq.tasks(name)] == ["slow-queue"]
            for call in (nq.pause, nq.resume, nq.purge_queue):
                await call(name)
        finally:
            await nq.delete_queue(name, force=True)
            await nq.prune(0)


class TestManyPayloads:
    @pytest.mark.parametrize(
        "payloads",
        [None, 5, "abc", b"abc", memoryview(b"abc"), {"a": 1}, Broken()],
        ids=type,
    )
    async def test_a_single_payload_is_refused(self, nq: nqnb.Client, payloads: Any) -> None:
        with pytest.raises(BadInput) as caught:
            await nq.submit_many("many-none", payloads)
        refused(caught.value, "payloads")

    async def test_an_async_iterable_is_refused(self, nq: nqnb.Client) -> None:
        async def payloads() -> AsyncIterator[int]:
            yield 1

        with pytest.raises(BadInput, match=r"is asynchronous\. Pass a list"):
            await nq.submit_many("many-none", payloads())  # type: ignore[call-overload]  # that is what is tried

    @pytest.mark.parametrize("options", [{"errors": "bogus"}, {"retry": -1}, {"timeout": "1"}, {"process_at": 5}])
    async def test_a_bad_option_is_refused_once_and_nothing_is_sent(self, nq: nqnb.Client, options: Any) -> None:
        payloads = iter(range(3))
        with pytest.raises(BadInput) as caught:
            await nq.submit_many("many-none", payloads, **options)
        refused(caught.value, next(iter(options)))
        assert list(payloads) == [0, 1, 2], "none was drawn"

    @pytest.mark.parametrize("errors", ["raise", "return"])
    async def test_an_iterable_that_raises_loses_no_accepted_task(self, nq: nqnb.Client, errors: Any) -> None:
        def payloads() -> Iterator[int]:
            yield from range(3)
            raise OverflowError("the file ends here")

        with pytest.raises(NotSubmitted, match=r"position 3: .*OverflowError: the file ends here") as caught:
            await nq.submit_many("many", payloads(), errors=errors)
        assert isinstance(caught.value.__cause__, OverflowError)
        assert [task and await task.status() for task in caught.value.tasks] == [Status.PENDING] * 3 + [None]


class TestFlags:
    async def test_must_be_true_or_false(self, nq: nqnb.Client) -> None:
        await nq.submit("flags")
        for flag in ("no", None, 1, Broken()):
            bad: Any = flag
            for call in (nq.delete_queue("flags", bad), nq.prune(0, dry_run=bad)):
                with pytest.raises(BadInput, match="expected True or False"):
                    await call
            for make in (nqnb.DevServer, nqnb.Worker):
                with pytest.raises(BadInput, match="expected True or False"):
                    make(**{"jetstream" if make is nqnb.DevServer else "shutdown_on_disconnect": bad})
        true: Any = np.bool_(True)
        assert (await nq.prune(0, dry_run=true)).dry_run is True


@pytest.mark.parametrize(
    "arguments",
    [{"port": "4222"}, {"port": True}, {"store_dir": 5}, {"go_queues": 5}, {"config": b""}, {"port": Broken()}],
)
def test_a_dev_server_refuses_invalid_options(arguments: Any) -> None:
    with pytest.raises(BadInput):
        nqnb.DevServer(**arguments)


def test_a_session_refuses_what_the_client_refuses(server: nqnb.DevServer) -> None:
    session = Session(nqnb.Settings(server.url))
    session.connect()
    try:
        task = session.submit("session")
        assert session.tasks("session", 0).index.tolist() == [task.id]
        wrong: Any
        for wrong in (math.nan, "5", 10**19, True, Broken()):
            for call in (
                lambda: task.wait(wrong),  # noqa: B023  it is called at once
                lambda: session.cancel(task, wrong),  # noqa: B023  as above
                lambda: session.prune(wrong),  # noqa: B023  as above
                lambda: session.tasks(since=cast("float", [wrong])),  # noqa: B023  as above
                lambda: session.down(wait=wrong),  # noqa: B023  as above
                lambda: session.local.stop(wait=wrong),  # noqa: B023  as above
                lambda: session.map("session", [1], errors=wrong),  # noqa: B023  as above
                lambda: session.wait(task.id, cancel_on_interrupt=[wrong]),  # type: ignore[arg-type]  # noqa: B023  as above
                lambda: session.call(wrong),  # noqa: B023  as above
            ):
                with pytest.raises(BadInput):
                    call()
        with pytest.raises(UnknownQueue, match="Did you mean 'session'"):
            session.tasks("sesion")
        with pytest.raises(WaitTimeout):
            task.result(0)
        assert task.status() is Status.PENDING
    finally:
        session.down()


async def test_a_progress_callback_that_cannot_take_both_counts_is_refused(nq: nqnb.Client) -> None:
    with pytest.raises(nqnb.BadInput, match=r"cannot be called with 2 arguments"):
        await nq.purge_queue("resize", lambda done: None)  # type: ignore[arg-type,misc]  # the bad argument is the point
