"""Which names go onto the server, and which do not."""

from __future__ import annotations

import re

import pytest

from nqnb.errors import InvalidQueueName, InvalidTaskId
from nqnb.protocol import names


@pytest.mark.parametrize("queue", ["a", "gold", "A-z_09", "-", "_", "cancel", "my_cancels", "x" * 200])
def test_queue_names_that_are_taken(queue: str) -> None:
    assert names.check_queue(queue) == queue


@pytest.mark.parametrize(
    "queue",
    [
        *("", " ", "a b", "a.b", "a/b", "a*", ">", "$JS", "käse", "a\n", "a\x00", "x" * 201),
        *("gold_cancel", "_cancel", None, 7, b"gold", ["gold"]),
    ],
)
def test_queue_names_that_are_refused(queue: object) -> None:
    with pytest.raises(InvalidQueueName) as caught:
        names.check_queue(queue)
    assert caught.value.queue == queue
    assert repr(queue)[:60] in str(caught.value)
    assert re.search("expected 1 to 200|Choose another", str(caught.value))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("task_id", ["a", "0", "a.b", "a/b/c", "=", "-", "a=1-2_3.4/5", "x" * 200])
def test_task_ids_that_are_taken(task_id: str) -> None:
    assert names.check_task_id(task_id) == task_id


@pytest.mark.parametrize(
    "task_id",
    ["", " ", "a b", "a*", "a>", "a:b", "ü", "a\n", "x" * 201, ".", ".a", "a.", "a..b", "$a", None, 7, b"a"],
)
def test_task_ids_that_are_refused(task_id: object) -> None:
    with pytest.raises(InvalidTaskId) as caught:
        names.check_task_id(task_id)
    assert caught.value.task_id == task_id
    assert repr(task_id)[:60] in str(caught.value)
    assert re.search("expected 1 to 200|two dots in a row", str(caught.value))
    assert len(str(caught.value)) < 250


def test_fresh_ids_look_like_nqs_and_differ() -> None:
    fresh = {names.new_task_id() for _ in range(1000)}
    assert len(fresh) == 1000
    assert all(re.fullmatch(r"[0-9A-Za-z]{22}", each) for each in fresh)
    # Every character of the alphabet is drawn: 22,000 draws miss one of 62 about never.
    assert len(set("".join(fresh))) == 62


def test_names_on_the_server_are_nqs() -> None:
    assert names.task_stream("gold") == "gold"
    assert names.task_subject("gold") == "gold.task"
    assert names.cancel_subject("gold") == "gold.cancel"
    assert names.cancel_stream("gold") == "gold_cancel"
    assert names.cancel_stream("gold", old_server=True) == "gold/cancel"
    assert names.CONSUMER == "MONITOR"
    assert names.bucket_stream(names.STATE_BUCKET) == "KV_nq-store"
    assert names.key_subject(names.STATE_BUCKET, "a.b/c") == "$KV.nq-store.a.b/c"


def test_queue_of_subject_is_the_inverse() -> None:
    assert names.queue_of_subject(names.task_subject("gold")) == "gold"


def test_no_queue_can_have_the_stream_of_anothers_cancels() -> None:
    with pytest.raises(InvalidQueueName):
        names.check_queue(names.cancel_stream("gold"))
