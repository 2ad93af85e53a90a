"""What cannot be used is refused in one sentence with the value and a remedy, and spoils nothing for what follows."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import date, datetime, timedelta, timezone
from typing import Any

import msgspec
import pandas as pd
import pytest
from helpers.history import assert_queues_empty

import nqnb
from nqnb import (
    BadInput,
    InvalidQueueName,
    InvalidTaskId,
    NoJetStream,
    NoServer,
    NotCancellable,
    NotSubmitted,
    PayloadTooLarge,
    Status,
    TaskExists,
    TaskFailed,
    UnencodableValue,
    UnknownTask,
)
from nqnb.protocol.names import CLIENT_HEADER, key_subject
from nqnb.protocol.submit import make_message, submit
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio

MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def server() -> Iterator[nqnb.DevServer]:
    """One server for all that is here."""
    with nqnb.DevServer() as server:
        yield server


@pytest.fixture
async def nq(settings: nqnb.Settings) -> AsyncIterator[nqnb.Client]:
    """An open client of it; whatever the test has stored is removed."""
    async with nqnb.connect(settings) as client:
        yield client
        connection = client.backend.connection
        for name in (await connection.api("STREAM.NAMES"))["streams"]:
            await connection.api(f"STREAM.DELETE.{name}")


async def refusal(kind: type[Exception], call: Coroutine[Any, Any, Any], *parts: str) -> Any:
    """The error that a call raises: exactly of that class, in one line, with all these parts."""
    with pytest.raises(kind) as caught:
        await call
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return caught.value


async def run(nq: nqnb.Client, settings: nqnb.Settings, function: Callable[..., Any], **options: Any) -> nqnb.TaskInfo:
    """What becomes of one task that a worker runs with a function; nothing stays in the queue."""
    worker = nqnb.Worker(settings)
    worker.handler("work", backoff=nqnb.Backoff(0, 0))(function)
    async with worker:
        task = await nq.submit("work", **options)
        await task.wait(timeout=30)
        await assert_queues_empty(nq, "work", within=3)
        return await task.fetch()


async def the_next_task_runs(nq: nqnb.Client, queue: str) -> None:
    task = await nq.submit(queue, "good")
    assert await task.wait(timeout=30) is Status.COMPLETED


class TestInvalidNames:
    @pytest.mark.parametrize(
        "queue", ["", "a b", "a.b", "a*", ">", "x/cancel", "käse", "gold_cancel", "x" * 201, None, 7]
    )
    async def test_a_queue_name_that_is_invalid_is_refused(self, nq: nqnb.Client, queue: Any) -> None:
        shown = repr(queue)[:60]
        for call in (nq.submit(queue, 1), nq.submit_many(queue, [1, 2])):
            error = await refusal(InvalidQueueName, call, shown, "queue name", "is invalid")
            assert error.queue == queue
        assert await nq.queues() == []

    @pytest.mark.parametrize("task_id", ["", "a b", "a*", "ü", ".a", "a.", "a..b", "x" * 201, 7, b"a"])
    async def test_a_task_id_that_is_invalid_is_refused(self, nq: nqnb.Client, task_id: Any) -> None:
        shown = repr(task_id)[:60]
        calls = [nq.submit("q", id=task_id), nq.fetch(task_id), nq.status(task_id), nq.cancel(task_id)]
        for call in (*calls, nq.wait(task_id), nq.result(task_id)):
            error = await refusal(InvalidTaskId, call, shown, "task id", "is invalid")
            assert error.task_id == task_id
        with pytest.raises(InvalidTaskId):
            nq.task(task_id)
        assert await nq.queues() == []


class TestTakenIds:
    @pytest.mark.parametrize("payload", ["one", "other"])
    async def test_of_a_pending_task_are_refused(self, nq: nqnb.Client, payload: str) -> None:
        task = await nq.submit("q", "one", id="mine")
        error = await refusal(TaskExists, nq.submit("q", payload, id="mine"), "'mine' is taken", "Choose another")
        assert error.task_id == "mine"
        assert (await task.fetch()).payload == b'"one"'
        assert [each.pending for each in await nq.queues()] == [1]

    @pytest.mark.parametrize("payload", ["one", "other"])
    async def test_of_a_completed_task_are_refused(
        self, nq: nqnb.Client, settings: nqnb.Settings, payload: str
    ) -> None:
        info = await run(nq, settings, lambda job, payload: payload, payload="one", id="mine")
        await refusal(TaskExists, nq.submit("work", payload, id="mine"), "'mine'")
        assert await nq.task("mine").fetch() == info
        await assert_queues_empty(nq, "work")

    async def test_of_a_cancelled_task_are_refused(self, nq: nqnb.Client) -> None:
        await (await nq.submit("q", "one", id="mine")).cancel()
        await refusal(TaskExists, nq.submit("q", "one", id="mine"), "'mine'")
        await assert_queues_empty(nq, "q")

    async def test_of_a_task_in_another_queue_are_refused(self, nq: nqnb.Client) -> None:
        await nq.submit("q", "one", id="mine")
        await refusal(TaskExists, nq.submit("other", "one", id="mine"), "'mine'")

    async def test_one_of_two_concurrent_submits_succeeds(self, nq: nqnb.Client) -> None:
        results = await asyncio.gather(
            nq.submit("q", "one", id="mine"), nq.submit("q", "other", id="mine"), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in results) == ["Task", "TaskExists"]
        winner = "one" if isinstance(results[0], nqnb.Task) else "other"
        assert (await nq.fetch("mine")).payload == f'"{winner}"'.encode()
        assert [each.pending for each in await nq.queues()] == [1]

    async def test_one_of_two_concurrent_submits_to_two_queues_succeeds(self, nq: nqnb.Client) -> None:
        # Both have looked before either has written, and in both queues it is message number 1.
        await nq.submit("one", id="mine")
        late = submit(nq.backend, make_message("two", 2, id="mine"), "bob", chosen=False)
        await refusal(TaskExists, late, "'mine'")
        await assert_queues_empty(nq, "two")

    async def test_a_message_without_an_entry_is_the_same_task(
        self, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def lost(*_: object) -> int:
            raise nqnb.ServerRefused("the cable was pulled", 500, 0, "")

        with monkeypatch.context() as cut:
            cut.setattr(nq.backend.states, "create", lost)
            await refusal(
                nqnb.Unconfirmed, nq.submit("q", 1, id="mine"), "'mine'", "cable was pulled", "will write the state"
            )
        await refusal(TaskExists, nq.submit("q", 2, id="mine"), "'mine'", "Choose another")
        assert (await nq.submit("q", 1, id="mine")).id == "mine"
        assert [each.pending for each in await nq.queues()] == [1]


class TestPayloads:
    @pytest.mark.parametrize(
        ("payload", "part", "remedy"),
        [
            ({"rows": [1, object()]}, "payload['rows'][1]", "Convert the value to strings"),
            ([float("nan")], "payload[0]", "Send None or a string"),
            ({"df": pd.DataFrame()}, "payload['df']", '.to_dict("records")'),
            ({("a",): 1}, "the key ('a',) of payload", "must be a string or a number"),
        ],
    )
    async def test_that_json_cannot_encode_are_refused(
        self, nq: nqnb.Client, payload: object, part: str, remedy: str
    ) -> None:
        error = await refusal(UnencodableValue, nq.submit("q", payload), part, remedy)
        assert error.part == part
        assert await nq.queues() == []

    @pytest.mark.parametrize("size", [MEGABYTE, 3 * MEGABYTE // 4, 20 * MEGABYTE])
    async def test_larger_than_the_server_accepts_are_refused(self, nq: nqnb.Client, size: int) -> None:
        shown = (f"{size:,} bytes", f"limit is {MEGABYTE:,}", "Send the path or key", "increase max_payload")
        queue = f"q-{size}"
        error = await refusal(PayloadTooLarge, nq.submit(queue, bytes(size)), *shown)
        assert error.limit == MEGABYTE < error.size
        assert isinstance(await nq.submit(queue, b"small"), nqnb.Task)
        assert [(each.name, each.pending) for each in await nq.queues()] == [(queue, 1)]

    async def test_the_largest_accepted_one_runs_and_is_read_back(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        with pytest.raises(PayloadTooLarge) as caught:
            await nq.submit("work", bytes(MEGABYTE))
        over = caught.value.size - caught.value.limit
        size = MEGABYTE - over * 3 // 4 - 8

        def handle(job: nqnb.Job) -> int:
            for _ in range(30):
                job.log("x" * 300)
            return len(job.payload)

        info = await run(nq, settings, handle, payload=bytes(size))
        assert (info.status, bytes(info.result)) == (Status.COMPLETED, b"%d" % size)

    async def test_a_large_one_can_fail_with_a_long_error(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        def handle(job: nqnb.Job) -> None:
            raise ValueError("x" * MEGABYTE)

        info = await run(nq, settings, handle, payload=bytes(750_000))
        assert info.status is Status.FAILED
        assert info.error is not None
        assert info.error.type == "ValueError"


class TestOptions:
    @pytest.mark.parametrize("retry", [-1, 1.5, "3", None, True])
    async def test_an_invalid_retry_is_refused(self, nq: nqnb.Client, retry: Any) -> None:
        await refusal(BadInput, nq.submit("q", retry=retry), f"retry={retry!r}", "0 to 2,147,483,647")

    async def test_a_retry_beyond_gos_integers_is_refused(self, nq: nqnb.Client) -> None:
        await refusal(BadInput, nq.submit("q", retry=2**64), f"retry={2**64}")

    @pytest.mark.parametrize(
        "timeout", [0, -1, float("nan"), math.inf, "60", True, timedelta(0), timedelta(seconds=-1)]
    )
    async def test_an_invalid_timeout_is_refused(self, nq: nqnb.Client, timeout: Any) -> None:
        await refusal(
            BadInput, nq.submit("q", timeout=timeout), f"timeout={timeout!r} is invalid", "Pass seconds or a timedelta"
        )

    @pytest.mark.parametrize("moment", ["tomorrow", 5, 1795489228.0, date(2026, 11, 24), (2026, 11, 24)])
    @pytest.mark.parametrize("name", ["deadline", "process_at"])
    async def test_an_invalid_moment_is_refused(self, nq: nqnb.Client, name: str, moment: Any) -> None:
        call = nq.submit("q", **{name: moment})
        await refusal(
            BadInput, call, f"{name}={moment!r} is invalid", "Pass a datetime, or a timedelta relative to now"
        )

    @pytest.mark.parametrize("moment", [timedelta.max, datetime.min, pd.NaT])  # NaT says that it is a datetime
    @pytest.mark.parametrize("name", ["deadline", "process_at"])
    async def test_a_moment_beyond_the_calendar_is_refused(self, nq: nqnb.Client, name: str, moment: Any) -> None:
        await refusal(
            BadInput, nq.submit("q", **{name: moment}), f"{name}={moment}", "the year must be between 1970 and 2261"
        )

    @pytest.mark.parametrize("serial", ["", "x" * 201, "a\n", 5, b"a", len])
    async def test_an_invalid_serial_key_is_refused(self, nq: nqnb.Client, serial: Any) -> None:
        await refusal(BadInput, nq.submit("q", 1.5, serial=serial), "serial=", "is invalid", "Pass a key such as")

    async def test_a_refused_option_sends_nothing(self, nq: nqnb.Client) -> None:
        for options in ({"retry": -1}, {"timeout": 0}, {"deadline": "x"}, {"process_at": 5}):
            with pytest.raises(BadInput):
                await nq.submit("q", **options)
        assert await nq.queues() == []
        assert await nq.tasks() == []

    async def test_a_deadline_at_the_epoch_has_passed(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        started: list[nqnb.Job] = []
        info = await run(nq, settings, started.append, deadline=datetime(1970, 1, 1, tzinfo=timezone.utc))
        assert info.status is Status.FAILED
        assert started == []


class TestSubmitMany:
    PAYLOADS = (0, object(), 2, float("nan"), b"4", bytes(2 * MEGABYTE), 6)
    BAD = (1, 3, 5)

    async def test_valid_ones_are_accepted_and_the_error_lists_the_others(self, nq: nqnb.Client) -> None:
        call = nq.submit_many("q", self.PAYLOADS)
        error = await refusal(NotSubmitted, call, "3 of 7 tasks were not accepted", "at position 1", "payload")
        assert {index: type(each) for index, each in error.errors.items()} == {
            1: UnencodableValue,
            3: UnencodableValue,
            5: PayloadTooLarge,
        }
        assert [task is None for task in error.tasks] == [index in self.BAD for index in range(7)]
        assert [(await task.fetch()).payload for task in error.tasks if task] == [b"0", b"2", b"4", b"6"]
        assert [each.pending for each in await nq.queues()] == [4]

    async def test_errors_can_be_returned_in_place_of_their_tasks(self, nq: nqnb.Client) -> None:
        results = await nq.submit_many("q", iter(self.PAYLOADS), errors="return")
        assert [isinstance(each, nqnb.NqnbError) for each in results] == [index in self.BAD for index in range(7)]
        assert [(await each.fetch()).payload for each in results if isinstance(each, nqnb.Task)] == [
            b"0",
            b"2",
            b"4",
            b"6",
        ]

    async def test_an_empty_list_of_payloads_submits_nothing(self, nq: nqnb.Client) -> None:
        assert await nq.submit_many("q", []) == []


class TestUnknownTasks:
    async def test_every_call_raises_unknown_task(self, nq: nqnb.Client) -> None:
        task = nq.task("never-was")
        for call in (task.fetch(), task.status(), task.cancel(), task.cancel(wait=1), task.wait(1), task.result()):
            error = await refusal(UnknownTask, call, "'never-was'", "Check the id and the server")
            assert error.task_id == "never-was"
        with pytest.raises(UnknownTask):
            await anext(task.updates())


class TestCancel:
    @pytest.mark.parametrize(
        ("function", "status"), [(lambda job: 1, Status.COMPLETED), (lambda job: 1 / 0, Status.FAILED)]
    )
    async def test_of_a_task_that_has_ended_is_refused(
        self, nq: nqnb.Client, settings: nqnb.Settings, function: Any, status: Status
    ) -> None:
        info = await run(nq, settings, function)
        error = await refusal(
            NotCancellable, nq.cancel(info.id), f"'{info.id}' cannot be cancelled: it has already {status.label}"
        )
        assert (error.task_id, error.status) == (info.id, status)
        assert await nq.fetch(info.id) == info

    async def test_of_a_deleted_task_returns_its_receipt_again(self, nq: nqnb.Client) -> None:
        task = await nq.submit("q")
        receipt = await task.cancel()
        assert receipt.status is Status.DELETED
        assert await task.cancel() == receipt
        assert await task.cancel(wait=1) == receipt

    async def test_of_a_cancelled_task_returns_its_receipt_again(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        worker = nqnb.Worker(settings)
        started = threading.Event()

        @worker.handler("work")
        def work(job: nqnb.Job) -> None:
            started.set()
            job.wait(10)

        async with worker:
            task = await nq.submit("work")
            assert await asyncio.to_thread(started.wait, 5)
            receipt = await task.cancel(wait=30)
            assert (receipt.status, receipt.stopping) == (Status.CANCELLED, False)
            assert await task.cancel() == receipt
        assert await task.cancel(wait=1) == receipt


class TestResults:
    async def test_a_large_result_is_read_back(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        info = await run(nq, settings, lambda job: ["x" * 1000] * 100)
        assert info.status is Status.COMPLETED
        assert info.result_key
        assert await nq.result(info.id) == ["x" * 1000] * 100

    @pytest.mark.parametrize(
        ("value", "parts"),
        [
            ({"model": object()}, ["result['model']", "Convert the value"]),
            ([1.0, math.inf], ["result[1] cannot be encoded as JSON: it is inf", "Send None or a string"]),
            (pd.DataFrame({"a": [1]}), ["result", "DataFrame", '.to_dict("records")']),
        ],
    )
    async def test_a_result_that_json_cannot_encode_fails_the_task(
        self, nq: nqnb.Client, settings: nqnb.Settings, value: object, parts: list[str]
    ) -> None:
        info = await run(nq, settings, lambda job: value, retry=3)
        assert (info.status, info.attempt) == (Status.FAILED, 1)
        await refusal(TaskFailed, nq.result(info.id), info.id, "UnencodableResult", *parts)

    async def test_a_result_larger_than_the_server_accepts_fails_the_task(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        info = await run(nq, settings, lambda job: "x" * 2 * MEGABYTE, retry=3)
        assert (info.status, info.attempt) == (Status.FAILED, 1)
        shown = (f"{2 * MEGABYTE + 2:,} bytes", f"{MEGABYTE:,}", "return its path or key")
        await refusal(TaskFailed, nq.result(info.id), *shown)

    async def test_a_result_whose_encoder_raises_fails_the_task(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        class Broken:
            def __fspath__(self) -> str:
                raise RuntimeError("no path today")

        info = await run(nq, settings, lambda job: [Broken()])
        assert info.status is Status.FAILED


class TestWhatHandlersSay:
    """Texts and numbers that JSON cannot carry must not cost a task its outcome."""

    async def test_an_error_with_a_file_name_that_is_not_utf8_is_recorded(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        def handle(job: nqnb.Job) -> None:
            raise ValueError(f"{os.fsdecode(b'/caf' + bytes([0xE9]))} is not a picture")

        info = await run(nq, settings, handle)
        assert info.status is Status.FAILED
        assert info.error is not None
        assert info.error.type == "ValueError"
        assert "/caf" in info.error.message

    async def test_a_log_line_that_is_not_utf8_is_recorded(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        info = await run(nq, settings, lambda job: job.log("caf\udce9"))
        assert info.status is Status.COMPLETED
        assert "caf" in info.log[0]

    async def test_progress_with_a_string_that_is_not_utf8_is_recorded(
        self, nq: nqnb.Client, settings: nqnb.Settings
    ) -> None:
        info = await run(nq, settings, lambda job: job.progress(1, 2, "caf\udce9"))
        assert info.status is Status.COMPLETED
        assert info.progress is not None
        assert info.progress.done == 1

    @pytest.mark.parametrize("done", [math.nan, math.inf])
    async def test_progress_that_is_not_finite_is_refused(
        self, nq: nqnb.Client, settings: nqnb.Settings, done: float
    ) -> None:
        async def handle(job: nqnb.Job) -> str:
            job.progress(done, 2)
            await asyncio.sleep(0.8)  # long enough for a heartbeat to read what was written
            return "done"

        info = await run(nq, settings, handle)
        assert (info.status, info.marked) == (Status.COMPLETED, True)
        assert await nq.result(info.id) == "done"

    async def test_an_error_whose_str_raises_is_recorded(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        class Mute(Exception):
            def __str__(self) -> str:
                raise RuntimeError("no words")

        def handle(job: nqnb.Job) -> None:
            raise Mute

        info = await run(nq, settings, handle)
        assert info.status is Status.FAILED
        assert info.error is not None
        assert "Mute" in info.error.type


class TestMisfits:
    """Payloads that do not fit the handler's annotation."""

    @dataclasses.dataclass
    class Resize:
        path: str
        width: int

    class Crop(msgspec.Struct):
        path: str
        box: tuple[int, int]

    @pytest.mark.parametrize(
        ("kind", "payload", "where"),
        [
            (Resize, {"path": "a", "width": "wide"}, "Expected `int`, got `str` - at `$.width`"),
            (Resize, {"path": "a"}, "missing required field `width`"),
            (Crop, {"path": "a", "box": [1, 2.5]}, "Expected `int`, got `float` - at `$.box[1]`"),
            (Crop, [1], "Expected `object`, got `array`"),
            (int, b"not json", "the payload does not match"),
            (list, b"[" * 100_000, "the payload does not match"),
        ],
    )
    async def test_fail_at_once_and_name_the_field(
        self, nq: nqnb.Client, settings: nqnb.Settings, kind: type, payload: object, where: str
    ) -> None:
        def resize(job: nqnb.Job, payload: Any) -> None:
            pytest.fail("it does not fit")

        resize.__annotations__["payload"] = kind
        info = await run(nq, settings, resize, payload=payload, retry=3)
        assert (info.status, info.attempt) == (Status.FAILED, 1)
        await refusal(TaskFailed, nq.result(info.id), "resize", where)


def task_json(**fields: Any) -> bytes:
    return msgspec.json.encode({"ID": "a", "Queue": "foreign", **fields})


NO_TASKS = {
    "nothing": b"",
    "text": b"hello",
    "an array": b"[1, 2]",
    "a number": b"7",
    "cut off": task_json()[:-1],
    "no id": b'{"Queue":"foreign"}',
    "an empty id": task_json(ID=""),
    "an id with a space": task_json(ID="a b"),
    "an id with a wildcard": task_json(ID="a.>"),
    "no queue": b'{"ID":"a"}',
    "a list as id": task_json(ID=["a"]),
    "text as status": task_json(Status="pending"),
    "no base64": task_json(Payload="!"),
    "a fraction as timeout": task_json(Timeout=1.5),
    "a huge one": b"x" * (MEGABYTE - 100),
    "a cancel": b'{"ID":"a","StreamName":"foreign.cancel"}',
}
"""Messages that another program may publish to a queue."""


class TestForeignMessages:
    async def publish(self, nq: nqnb.Client, *messages: bytes) -> None:
        await nq.backend.ensure_queue("foreign")
        for data in messages:
            await nq.backend.connection.publish("foreign.task", data)

    def worker(self, settings: nqnb.Settings) -> nqnb.Worker:
        worker = nqnb.Worker(settings, concurrency=2)
        worker.handler("foreign")(lambda job: None)
        return worker

    async def test_a_cancel_of_a_very_long_id_stops_no_worker(self, nq: nqnb.Client, settings: nqnb.Settings) -> None:
        async with self.worker(settings):
            await nq.backend.ensure_queue("foreign")
            await nq.backend.connection.publish("foreign.cancel", b'{"ID":"' + b"x" * 5000 + b'","StreamName":"s"}')
            await asyncio.sleep(0.3)
            await the_next_task_runs(nq, "foreign")

    async def test_messages_that_are_not_tasks_are_dropped_and_counted_once(
        self, nq: nqnb.Client, settings: nqnb.Settings, seed: int
    ) -> None:
        # Random bytes that could be the start of something valid would be no accident.
        noise = [b"\x80" + random.randbytes(random.randrange(200)) for _ in range(20)]
        await self.publish(nq, *NO_TASKS.values(), *noise)
        async with self.worker(settings) as worker:
            await the_next_task_runs(nq, "foreign")
            await assert_queues_empty(nq, "foreign")
            assert worker.malformed == len(NO_TASKS) + len(noise)
            await asyncio.sleep(1.5 * settings.ack_wait)
            assert worker.malformed == len(NO_TASKS) + len(noise)
        assert len(await nq.tasks()) == 1

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b'{"ID":"\xff","Queue":"foreign"}', id="an id that is not UTF-8"),
            pytest.param(b'{"ID":"a","Queue":"foreign","More":' + b"[" * 100_000, id="deep"),
            # A server hangs up on who uses such a subject.
            pytest.param(b'{"ID":"a","Queue":"' + b"q" * 5000 + b'"}', id="a long queue"),
        ],
    )
    async def test_messages_that_resemble_tasks_are_dropped_too(
        self, nq: nqnb.Client, settings: nqnb.Settings, data: bytes
    ) -> None:
        await self.publish(nq, data)
        async with self.worker(settings) as worker:
            await the_next_task_runs(nq, "foreign")
            await assert_queues_empty(nq, "foreign", within=2)
            assert worker.malformed == 1

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(task_json(Deadline=1795489228000), id="a deadline in milliseconds"),
            pytest.param(task_json(Deadline=2**63 - 1), id="a deadline in no calendar"),
            pytest.param(task_json(Timeout=2**63 - 1), id="the longest timeout of Go"),
            pytest.param(task_json(Payload="A" * (MEGABYTE - 152)), id="no room for a state beside the payload"),
            pytest.param(task_json(MaxRetry=-1, CurrentRetry=-5), id="negative retries"),
            # The worker stops the task at once, so the task fails, and is retried.
            pytest.param(task_json(Timeout=-1, CurrentRetry=-(2**63)), id="retries without end"),
            pytest.param(task_json(ProcessAt="soon"), id="a time that is none"),
            pytest.param(task_json(Queue="another"), id="a queue of another name"),
            pytest.param(task_json(Queue="no queue at all!"), id="a queue that cannot be"),
        ],
    )
    async def test_odd_tasks_end(self, nq: nqnb.Client, settings: nqnb.Settings, data: bytes) -> None:
        # Go's state follows its message, without a mark; where it has no room, ours is as good.
        await nq.backend.ensure_queue("foreign")
        full = len(data) > MEGABYTE // 2
        await nq.backend.connection.publish("foreign.task", data, {CLIENT_HEADER: "task"} if full else None)
        entry = TaskMessage.decode(data)
        entry.Sequence = 1
        if not full:
            await nq.backend.connection.publish(key_subject("nq-store", "a"), entry.encode())
        async with self.worker(settings) as worker:
            await the_next_task_runs(nq, "foreign")
            await assert_queues_empty(nq, "foreign", within=3)
        if not worker.malformed:
            assert (await nq.status("a")).terminal

    @pytest.mark.parametrize("deadline", [1795489228000, 2**63 - 1, -(2**63)])
    async def test_one_odd_entry_does_not_hide_the_others(self, nq: nqnb.Client, deadline: int) -> None:
        await nq.submit("q", id="good")
        await nq.backend.states.put("odd", TaskMessage(ID="odd", Queue="q", Deadline=deadline).encode())
        assert {info.id for info in await nq.tasks()} >= {"good"}
        assert (await nq.fetch("odd")).id == "odd"

    @pytest.mark.parametrize("value", [b"", b"no task", b'{"ID":"\xff","Queue":"q"}', b"[" * 100_000])
    async def test_an_entry_that_is_not_a_task_does_not_hide_the_others(self, nq: nqnb.Client, value: bytes) -> None:
        await nq.submit("q", id="good")
        await nq.backend.states.put("odd", value)
        assert [info.id for info in await nq.tasks()] == ["good"]
        with pytest.raises(nqnb.MalformedMessage):
            await nq.fetch("odd")

    @pytest.mark.parametrize("data", [b"", b"no cancel", b'{"ID":"\xff"}', b'{"ID":"a b"}', b'{"ID":".."}'])
    async def test_a_message_that_is_not_a_cancel_is_ignored(
        self, nq: nqnb.Client, settings: nqnb.Settings, data: bytes
    ) -> None:
        async with self.worker(settings):
            await nq.backend.connection.publish("foreign.cancel", data)
            await the_next_task_runs(nq, "foreign")
            task = await nq.submit("foreign", process_at=timedelta(seconds=60))
            assert (await task.cancel()).status is Status.DELETED


class TestUnreachableServers:
    async def open(self, settings: nqnb.Settings | str, **options: Any) -> None:
        async with nqnb.connect(settings, **options):
            pytest.fail("it is open")

    async def quick_refusal(self, *parts: str, url: str, connect_timeout: float = 60.0, **options: Any) -> NoServer:
        begun = time.monotonic()
        error: NoServer = await refusal(NoServer, self.open(url, connect_timeout=connect_timeout, **options), *parts)
        assert time.monotonic() - begun < 30
        return error

    async def test_a_refused_connection_is_reported(self) -> None:
        with socket.socket() as bound:  # bound and not listening: nobody else gets the port meanwhile
            bound.bind(("127.0.0.1", 0))
            url = f"nats://127.0.0.1:{bound.getsockname()[1]}"
            error = await self.quick_refusal(url, "the connection was refused", "`nqnb up --detach`", url=url)
            assert error.url == url
            secret = url.replace("//", "//ann:s3cret@")
            error = await self.quick_refusal(url, url=secret)
            assert "s3cret" not in f"{error} {error.url}"

    async def test_a_refused_connection_of_a_worker_is_reported(self) -> None:
        worker = nqnb.Worker("nats://127.0.0.1:1")
        worker.handler("q")(lambda job: None)
        await refusal(NoServer, worker.start(), "nats://127.0.0.1:1", "`nqnb up --detach`")

    async def test_an_unknown_host_is_reported(self) -> None:
        url = "nats://no-such-host.invalid:4222"
        await self.quick_refusal(url, "the host name is unknown; check its spelling", url=url)

    async def test_a_server_that_never_answers_is_reported(self) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            url = f"nats://127.0.0.1:{mute.getsockname()[1]}"
            await self.quick_refusal(url, "did not answer within 1 s", url=url, connect_timeout=1.0)

    async def test_a_server_of_another_protocol_is_reported(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        http = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{http.sockets[0].getsockname()[1]}"
        await self.quick_refusal(url, url=url)
        http.close()

    async def test_one_of_several_servers_is_enough(self, server: nqnb.DevServer) -> None:
        async with nqnb.connect(["nats://127.0.0.1:1", server.url]) as nq:
            assert await nq.queues() == []

    @pytest.mark.parametrize("given", [{"user": "ann", "password": "wr0ng"}, {"token": "wr0ng"}, {}])
    async def test_a_wrong_password_or_token_is_reported_and_not_shown(self, given: dict[str, Any]) -> None:
        with nqnb.DevServer(config="authorization { user: ann, password: s3cret }") as server:
            refused = "the server refused the login; check user, password or token"
            error = await self.quick_refusal(server.url, refused, url=server.url, **given)
            assert "wr0ng" not in f"{error}{error.__cause__}{error.__context__}"
            if "user" in given:
                error = await self.quick_refusal(refused, url=server.url.replace("//", "//ann:wr0ng@"))
                assert "wr0ng" not in f"{error} {error.url}"
            async with nqnb.connect(server.url, user="ann", password="s3cret") as nq:
                assert await nq.queues() == []

    async def test_a_wrong_token_in_the_url_is_not_shown(self) -> None:
        with nqnb.DevServer(config="authorization { token: s3cret }") as server:
            error = await self.quick_refusal(server.url, "check user, password or token", url=server.url, token="wr0ng")
            assert "wr0ng" not in f"{error} {error.url}"
            async with nqnb.connect(server.url.replace("//", "//s3cret@")) as nq:
                assert await nq.queues() == []

    async def test_a_server_without_jetstream_is_reported(self) -> None:
        with nqnb.DevServer(jetstream=False) as server:
            worker = nqnb.Worker(server.url)
            worker.handler("q")(lambda job: None)
            for call in (self.open(server.url), worker.start()):
                await refusal(NoJetStream, call, server.url, "JetStream is not enabled", "`-js`")
