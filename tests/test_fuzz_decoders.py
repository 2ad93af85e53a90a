"""Damaged bytes from every bucket and subject: a decoder answers with a record that can be used, or raises."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from helpers import damaged_messages
from helpers.damaged_messages import Mutator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from nqnb import payload
from nqnb.cli.render import render
from nqnb.commands.command_records import Tasks, Workers
from nqnb.errors import BadInput, MalformedMessage
from nqnb.frames import tasks_frame, workers_frame
from nqnb.protocol import lifecycle, names
from nqnb.protocol.submit import META_RESERVE
from nqnb.protocol.wire import CancelMessage, CancelRecord, Meta, Status, TaskMessage
from nqnb.records import CancelReceipt, TaskInfo, WorkerInfo
from nqnb.task_values import preview
from nqnb.text import to_json
from nqnb.widgets import row_content
from nqnb.widgets.rows import COLUMNS

INPUTS, INPUTS_FULL = 650, 12_000
"""How many inputs each of six surfaces gets."""
NOW = datetime.now(timezone.utc)
EXAMPLES, EXAMPLES_FULL = 60, 500


def printed(record: Any) -> str:
    """What a terminal gets of it."""
    file = io.StringIO()
    Console(file=file, width=100, color_system=None).print(render(record))
    return file.getvalue()


def assert_harmless(text: str) -> None:
    assert not any(ord(letter) < 32 and letter != "\n" for letter in text)
    text.encode()  # no half of a surrogate pair, which no terminal takes


def one_line(error: MalformedMessage) -> None:
    """Whatever the bytes were, their error is short and plain."""
    assert len(str(error)) < 1000
    assert_harmless(str(error))
    assert "\n" not in str(error)


def use_task(data: bytes) -> TaskInfo | None:
    """Do with a task message what clients and workers do; None where it is none."""
    try:
        task = TaskMessage.decode(data)
    except MalformedMessage as error:
        one_line(error)
        return None
    again = TaskMessage.decode(task.encode())
    assert again.encode() == task.encode()
    assert lifecycle.due_at(task) <= lifecycle.LAST_SCHEDULE
    for scheduled in (False, True):
        for entry in (None, task):
            lifecycle.claim(
                task,
                entry,
                sequence=7,
                deliveries=1,
                ours=True,
                scheduled=scheduled,
                owner_rest=0.0,
                now=time.time(),
                ack_wait=1.0,
            )
    lifecycle.heartbeat(task, claim="c1", retry=0)
    lifecycle.finish_again(task, claim="c1", retry=0, status=Status.COMPLETED)
    lifecycle.cancel(task, announced=False)
    if len(task.ID) + len(task.Queue) < 1000:
        lean = msgspec.structs.replace(
            task.lean(), Meta=msgspec.structs.replace(task.lean().meta, result=msgspec.UNSET)
        )
        assert len(lean.encode()) < META_RESERVE
    if task.ID == "a" and names.is_queue(task.Queue):
        assert TaskMessage.of_entry("a", data).encode() == task.encode()
    with pytest.raises(MalformedMessage):
        TaskMessage.of_entry(f"{task.ID}x", data)
    info = TaskInfo.of(task, 1)
    json.loads(to_json(info))
    row_content.search_text(info)
    msgspec.json.encode(
        [row_content.row(info), row_content.detail(info), [key(info, NOW) is None for key in COLUMNS.values()]]
    )
    return info


def use_presence(data: bytes) -> WorkerInfo | None:
    try:
        info = WorkerInfo.of_entry("w-1", data)
    except MalformedMessage as error:
        one_line(error)
        return None
    json.loads(to_json(info))
    return info


def use_intent(data: bytes) -> CancelReceipt:
    record = CancelRecord.of_intent(data)
    entry = TaskMessage(ID="a", Queue="q", Status=Status.CANCELLED, Meta=Meta(cancel=record)).encode()
    assert TaskMessage.decode(entry).meta.cancel == record
    assert len(entry) < META_RESERVE
    receipt = CancelReceipt.of("a", Status.CANCELLED, record)
    json.loads(to_json(receipt))
    return receipt


def use_cancel(data: bytes) -> CancelMessage | None:
    try:
        return CancelMessage.decode(data)
    except MalformedMessage:
        return None


def use_result(data: bytes) -> object:
    preview(data)
    try:
        return payload.decode_json(data) or True
    except BadInput:
        return None


SURFACES: dict[str, tuple[list[bytes], Callable[[bytes], object]]] = {
    "task stream and nq-store": (damaged_messages.tasks("a", "q"), use_task),
    "nq-workers": (damaged_messages.presences("w-1", "q"), use_presence),
    "nq-cancel": (damaged_messages.intents(), use_intent),
    "cancel subject": (damaged_messages.cancels("a", "q"), use_cancel),
    "nq-results": (damaged_messages.results(), use_result),
}


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    return INPUTS_FULL if request.config.getoption("--full") else INPUTS


@pytest.mark.parametrize("surface", SURFACES)
def test_undamaged_messages_are_read(surface: str) -> None:
    good, use = SURFACES[surface]
    for data in good:
        assert use(data) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("surface", SURFACES)
def test_damaged_messages_are_read_or_refused_as_malformed(surface: str, seed: int, count: int) -> None:
    good, use = SURFACES[surface]
    mutate, read = Mutator(seed), Counter[bool]()
    # The tasks have most ways to be read.
    for _ in range(count * (2 if use is use_task else 1)):
        data = mutate(mutate.choice(good))
        try:
            read[use(data) is not None] += 1
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, of {data[:2000]!r}") from error
    print(f"{surface}: {read.total()} inputs, of which {read[True]} were read")
    assert read[True]
    assert read[False] or use is use_intent


def test_tables_show_what_was_read_from_damaged_messages(seed: int) -> None:
    mutate = Mutator(seed)
    infos = [use_task(mutate(mutate.choice(damaged_messages.tasks("a", "q")))) for _ in range(400)]
    tasks = [each for each in infos if each is not None]
    workers = [use_presence(mutate(mutate.choice(damaged_messages.presences("w-1", "q")))) for _ in range(400)]
    alive = [each for each in workers if each is not None]
    assert len(tasks_frame(tasks)) == len(tasks) > 50
    assert len(workers_frame(alive)) == len(alive) > 50
    receipts = [use_intent(mutate(mutate.choice(damaged_messages.intents()))) for _ in range(100)]
    for text in (
        printed(Tasks(tasks, len(tasks))),
        printed(Workers(alive)),
        *map(printed, [*tasks[:50], *receipts[:50]]),
    ):
        assert_harmless(text)


kinds = (TaskMessage, Meta, WorkerInfo, CancelRecord, CancelMessage)
fields = st.sampled_from([name for kind in kinds for name in kind.__struct_fields__])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(max_size=5), inner, max_size=6),
    max_leaves=12,
)
INPUTS_BY_KIND: dict[str, st.SearchStrategy[bytes]] = {
    "records": st.dictionaries(fields, values, max_size=12).map(
        lambda record: json.dumps({"ID": "a", "Queue": "q", "id": "w-1", **record}).encode()
    ),
    "bytes": st.binary(max_size=200),
}


def examples(inputs: st.SearchStrategy[bytes], count: int) -> None:
    """Try so many inputs on every surface; hypothesis shrinks one that fails."""

    @settings(
        deadline=None, database=None, print_blob=True, max_examples=count, suppress_health_check=list(HealthCheck)
    )
    @given(inputs)
    def each_is_read_or_refused(data: bytes) -> None:
        for _, use in SURFACES.values():
            use(data)

    each_is_read_or_refused()


@pytest.mark.parametrize("inputs", INPUTS_BY_KIND.values(), ids=INPUTS_BY_KIND)
def test_any_bytes_are_read_or_refused_as_malformed(inputs: st.SearchStrategy[bytes]) -> None:
    examples(inputs, EXAMPLES)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("inputs", INPUTS_BY_KIND.values(), ids=INPUTS_BY_KIND)
def test_many_bytes_are_read_or_refused_as_malformed(inputs: st.SearchStrategy[bytes]) -> None:
    examples(inputs, EXAMPLES_FULL)
