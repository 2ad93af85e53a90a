"""The messages: byte for byte what Go NQ writes, and forgiving about what it may write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from nqnb.errors import MalformedMessage
from nqnb.protocol.wire import (
    CancelMessage,
    CancelRecord,
    ErrorInfo,
    Meta,
    Progress,
    Status,
    TaskMessage,
    entry_of,
    parse_time,
)

TRANSCRIPT = [json.loads(line) for line in Path(__file__).with_name("go_nq.jsonl").read_text().splitlines()]
"""What a Go client and a Go worker put on the wire; see its fields ``scenario``, ``subject`` and ``data``."""


def decoded(value: msgspec.Raw | msgspec.UnsetType) -> object:
    assert isinstance(value, msgspec.Raw)
    return msgspec.json.decode(value)


def data_of(*, cancels: bool) -> list[bytes]:
    """The transcript's cancels, or its tasks and entries."""
    found = []
    for line in TRANSCRIPT:
        subject = line["subject"]
        task = subject.endswith(".task") or subject == "gold" or subject.startswith("$KV.nq-store.")
        cancel = subject.endswith(".cancel") and not subject.startswith("$")
        if cancel if cancels else task:
            found.append(line["data"].encode())
    return found


def task_json(**fields: Any) -> bytes:
    return json.dumps({"ID": "a", "Queue": "q", **fields}).encode()


class TestTranscript:
    def test_it_is_covered(self) -> None:
        assert len(TRANSCRIPT) == 70
        assert len(data_of(cancels=False)) == 48
        assert len(data_of(cancels=True)) == 3

    @pytest.mark.parametrize("data", sorted(set(data_of(cancels=False))))
    def test_every_task_and_entry_comes_back_as_the_same_bytes(self, data: bytes) -> None:
        assert TaskMessage.decode(data).encode() == data

    @pytest.mark.parametrize("data", sorted(set(data_of(cancels=True))))
    def test_every_cancel_comes_back_as_the_same_bytes(self, data: bytes) -> None:
        assert CancelMessage.decode(data).encode() == data

    def test_its_values_arrive(self) -> None:
        line = next(each for each in TRANSCRIPT if each["scenario"] == "completed-timeout-retry-options")
        message = TaskMessage.decode(line["data"].encode())
        assert (message.ID, message.Queue, message.Payload) == ("done-2", "gold", b"50")
        assert (message.Status, message.Timeout, message.MaxRetry) == (Status.PENDING, 600, 3)
        assert not message.marked

    def test_it_has_every_state(self) -> None:
        assert {TaskMessage.decode(data).Status for data in data_of(cancels=False)} == set(Status)


class TestForgiving:
    def test_unknown_fields_are_ignored(self) -> None:
        assert TaskMessage.decode(task_json(Priority=7, Tags={"a": [1]})) == TaskMessage(ID="a", Queue="q")

    def test_missing_fields_are_zero(self) -> None:
        message = TaskMessage.decode(task_json())
        assert message == TaskMessage(ID="a", Queue="q")
        assert message.ProcessAt is UNSET
        assert message.Payload is None

    @pytest.mark.parametrize("name", [name for name in TaskMessage.__struct_fields__ if name not in ("ID", "Queue")])
    def test_null_is_the_zero_value(self, name: str) -> None:
        assert TaskMessage.decode(task_json(**{name: None})) == TaskMessage(ID="a", Queue="q")

    def test_null_payload_and_empty_payload_stay_apart(self) -> None:
        for data in (b"null", b'""'):
            full = TaskMessage(ID="a", Queue="q", Payload=b"x").encode().replace(b'"eA=="', data)
            assert TaskMessage.decode(full).encode() == full

    def test_null_beside_a_meta_leaves_the_meta_whole(self) -> None:
        meta = {"worker": "w", "result": {"x": [1]}, "log": ["a"], "error": {"type": "T"}}
        message = TaskMessage.decode(task_json(StreamName=None, Meta=meta))
        assert message.meta.worker == "w"
        assert message.meta.log == ["a"]
        assert message.meta.error == ErrorInfo("T")
        assert decoded(message.meta.result) == {"x": [1]}

    @pytest.mark.parametrize(
        "meta", ["text", 7, [1], True, {"log": "no list"}, {"started_at": "noon"}, {"worker": None}, {"progress": 3}]
    )
    def test_a_meta_that_is_not_ours_counts_as_none(self, meta: object) -> None:
        message = TaskMessage.decode(task_json(Status=1, Meta=meta))
        assert not message.marked
        assert message.meta == Meta()
        assert message.Status is Status.PROCESSING

    def test_a_meta_of_a_later_version_is_ours(self) -> None:
        message = TaskMessage.decode(task_json(Meta={"worker": "w", "colour": "red"}))
        assert message.marked
        assert message.meta.worker == "w"

    def test_an_empty_meta_marks(self) -> None:
        assert TaskMessage.decode(task_json(Meta={})).marked

    def test_largest_numbers_of_go(self) -> None:
        data = TaskMessage(Sequence=2**64 - 1, ID="a", Queue="q", Timeout=2**63 - 1, Deadline=-(2**63)).encode()
        assert TaskMessage.decode(data).encode() == data


class TestLikeGo:
    def test_html_is_escaped_as_go_does(self) -> None:
        # json.Marshal(struct{ID string}{"<a>&\u2028\u2029"}) in Go
        expected = rb'{"ID":"\u003ca\u003e\u0026\u2028\u2029","StreamName":""}'
        message = CancelMessage("<a>&\u2028\u2029")
        assert message.encode() == expected
        assert CancelMessage.decode(expected) == message

    def test_html_is_escaped_within_meta_too(self) -> None:
        meta = Meta(log=["<&>"], result=msgspec.Raw(b'"<\\u2028>"'))
        data = TaskMessage(ID="a", Queue="q", Meta=meta).encode()
        assert not set(b"<>&") & set(data)
        back = TaskMessage.decode(data).meta
        assert back.log == ["<&>"]
        assert decoded(back.result) == "<\u2028>"

    @pytest.mark.parametrize(
        "text", ["2026-11-24T03:00:28.830189625Z", "2026-11-24T08:30:28.000000001+05:30", "1970-01-01T00:00:00Z"]
    )
    def test_process_at_is_kept_as_it_came(self, text: str) -> None:
        data = task_json(ProcessAt=text)
        assert TaskMessage.decode(data).ProcessAt == text
        assert f'"ProcessAt":"{text}"'.encode() in TaskMessage.decode(data).encode()

    def test_without_process_at_none_is_written(self) -> None:
        assert b"ProcessAt" not in TaskMessage(ID="a", Queue="q").encode()

    def test_without_meta_none_is_written(self) -> None:
        assert b"Meta" not in TaskMessage(ID="a", Queue="q").encode()


class TestMalformed:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"hello",
            b"null",
            b"7",
            b'"text"',
            b"[1]",
            b"[]",
            b"{}",
            b'{"ID":"a"}',
            b'{"Queue":"q"}',
            b'{"ID":"","Queue":"q"}',
            b'{"ID":null,"Queue":"q"}',
            task_json(ID=7),
            task_json(Queue=["q"]),
            task_json(Status="pending"),
            task_json(Status=6),
            task_json(Status=-1),
            task_json(Payload="no base64!"),
            task_json(Payload=5),
            task_json(Timeout=1.5),
            task_json(Timeout="60"),
            task_json(MaxRetry=[]),
            task_json()[:-1],
            task_json() + b"}",
            b'{"ID":"\xff\xfe","Queue":"q"}',
            bytes(range(256)),
            pytest.param(b"[" * 100_000, id="deep array"),
            pytest.param(b'{"ID":"a","Queue":"q","More":' + b"[" * 100_000, id="deep unknown field"),
        ],
    )
    def test_tasks(self, data: bytes) -> None:
        with pytest.raises(MalformedMessage) as caught:
            TaskMessage.decode(data)
        assert caught.value.data == data
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        "data", [b"", b"x", b"{}", b'{"ID":""}', b'{"ID":3}', b'{"ID":"a","StreamName":[]}', b"[]"]
    )
    def test_cancels(self, data: bytes) -> None:
        with pytest.raises(MalformedMessage):
            CancelMessage.decode(data)

    def test_the_text_shows_where_it_starts_and_how_long_it_is(self) -> None:
        with pytest.raises(MalformedMessage, match=r"xxxx.*\(5000 bytes\)"):
            TaskMessage.decode(b"x" * 5000)


def test_meta_comes_back() -> None:
    meta = Meta(
        client="ann@host",
        submitted_at=1795485621.25,
        worker="w-1",
        claim="c-1",
        started_at=1795485622.5,
        finished_at=1795485623.5,
        not_before=1795485630.0,
        progress=Progress(3.5, 10.0, "thumbnails"),
        log=["one", "två"],
        error=ErrorInfo("ValueError", "no <value>", "Traceback …"),
        result=msgspec.Raw(b'{"a":[1,2.5,null]}'),
        result_key="a.17",
        cancel=CancelRecord("bob", 1.0, 2.0, 3.0, "w-1", "its thread was stopped"),
    )
    message = TaskMessage(Sequence=4, ID="a", Queue="q", Payload=b"\x00\xff", Status=Status.COMPLETED, Meta=meta)
    back = TaskMessage.decode(message.encode())
    assert back.marked
    assert back.encode() == message.encode()
    for name in Meta.__struct_fields__:
        ours, theirs = getattr(meta, name), getattr(back.meta, name)
        assert (bytes(ours) == bytes(theirs)) if name == "result" else (ours == theirs), name


def test_two_messages_share_no_log() -> None:
    one, other = Meta(), Meta()
    one.log.append("mine")
    assert other.log == []


@pytest.mark.parametrize(
    ("status", "terminal", "label"),
    [
        (Status.PENDING, False, "pending"),
        (Status.PROCESSING, False, "processing"),
        (Status.FAILED, True, "failed"),
        (Status.COMPLETED, True, "completed"),
        (Status.CANCELLED, True, "cancelled"),
        (Status.DELETED, True, "deleted"),
    ],
)
def test_states(status: Status, terminal: bool, label: str) -> None:
    assert status.terminal is terminal
    assert status.label == label


def test_states_have_nqs_numbers() -> None:
    assert [status.value for status in Status] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-24T03:00:28Z", 1795489228.0),
        ("2026-11-24T03:00:28.5Z", 1795489228.5),
        ("2026-11-24T03:00:28.830189625Z", 1795489228.830189),
        ("2026-11-24T03:00:28.000000999Z", 1795489228.0),
        ("2026-11-24T08:30:28.25+05:30", 1795489228.25),
        ("2026-11-24T03:00:28", 1795489228.0),
        ("0001-01-01T00:00:00Z", -62135596800.0),
        ("", 0.0),
        ("tomorrow", 0.0),
        ("2026-13-41T00:00:00Z", 0.0),
        ("2026-11-24T03:00:28.Z", 1795489228.0),
    ],
)
def test_parse_time(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize("status", Status)
def test_a_printed_state_is_its_label(status: Status) -> None:
    assert str(status) == f"{status}" == status.label
    assert f"{status:>12}" == status.label.rjust(12)


def test_the_first_entry_has_the_bytes_of_its_message_with_the_sequence() -> None:
    message = TaskMessage(ID="a", Queue="q", Payload=b"x", Meta=Meta(client="me"))
    assert entry_of(message.encode(), 71) == msgspec.structs.replace(message, Sequence=71).encode()


@pytest.mark.parametrize("data", [b"", b'{"ID":"a"}', b'{"Sequence":12,"ID":"a"}', b'{"Sequence": 0,"ID":"a"}'])
def test_another_programs_message_has_no_first_entry(data: bytes) -> None:
    assert entry_of(data, 7) is None
