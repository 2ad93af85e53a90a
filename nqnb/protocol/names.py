"""Every name that nqnb uses on the server, and which queue names and task ids it accepts.

The names are NQ's (stream ``<q>``, subjects ``<q>.task`` and ``<q>.cancel``, consumer ``MONITOR``, bucket
``nq-store``); the buckets ``nq-cancel``, ``nq-workers`` and ``nq-results`` are nqnb's own.
"""

from __future__ import annotations

import functools
import re
import secrets
import string

from nqnb.error_text import exact_text, shown
from nqnb.errors import InvalidQueueName, InvalidTaskId

CONSUMER = "MONITOR"
STATE_BUCKET = "nq-store"
INTENT_BUCKET = "nq-cancel"
PRESENCE_BUCKET = "nq-workers"
RESULT_BUCKET = "nq-results"

CLIENT_HEADER = "Nqnb-Client"
"""On every message that nqnb publishes; a message without it comes from another NQ client."""

_QUEUE = re.compile(r"[A-Za-z0-9_-]{1,200}")
_TASK_ID = re.compile(r"[-/_=.a-zA-Z0-9]{1,200}")
_KEY = re.compile(r"(?=.{1,1000}\Z)[-/_=a-zA-Z0-9]+(\.[-/_=a-zA-Z0-9]+)*")
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_LETTER_OF_BYTE = bytes(ord(_ALPHABET[byte % len(_ALPHABET)]) for byte in range(256))


def check_queue(queue: object) -> str:
    """Return the queue name, as a plain ``str``.

    Raises:
        InvalidQueueName: not 1 to 200 of ``A-Z a-z 0-9 _ -``, or it ends in ``_cancel``, which names cancel streams.
    """
    if not isinstance(queue, str) or not _QUEUE.fullmatch(queue):
        raise InvalidQueueName(
            f"{shown(queue)} cannot be a queue name: use 1 to 200 of the characters A-Z a-z 0-9 _ -", queue
        )
    if queue.endswith("_cancel"):
        raise InvalidQueueName(
            f"{shown(queue)} cannot be a queue name: names that end in '_cancel' belong to cancel streams; "
            "choose another ending",
            queue,
        )
    return exact_text(queue)


def check_task_id(task_id: object) -> str:
    """Return the task id, as a plain ``str``.

    Raises:
        InvalidTaskId: not 1 to 200 of ``A-Z a-z 0-9 - / _ = .``, or a dot leads, trails or is doubled.
    """
    if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId(
            f"{shown(task_id)} cannot be a task id: use 1 to 200 of the characters A-Z a-z 0-9 - / _ = .",
            task_id,
        )
    if task_id.startswith(".") or task_id.endswith(".") or ".." in task_id:
        raise InvalidTaskId(
            f"{shown(task_id)} cannot be a task id: a dot may stand only between other characters", task_id
        )
    return exact_text(task_id)


@functools.lru_cache(1000)
def is_queue(text: str) -> bool:
    """Return whether a text can be a queue's name, as `check_queue` has it."""
    return _QUEUE.fullmatch(text) is not None and not text.endswith("_cancel")


def is_key(text: str) -> bool:
    """Return whether a bucket can have a text as a key. A server also stores keys with wildcards.

    To read or purge such a key would be to read or purge others.
    """
    return _KEY.fullmatch(text) is not None


def new_task_id() -> str:
    """A fresh task id: 22 characters of base 62, as NQ's (NUID), with 125 bits of the system's randomness."""
    # A draw for each character would be a third of what a submit costs.
    return secrets.token_bytes(22).translate(_LETTER_OF_BYTE).decode()


def task_stream(queue: str) -> str:
    """The stream that is created for a queue's tasks; an existing one is found by its subject, whatever its name."""
    return queue


def task_subject(queue: str) -> str:
    """The subject on which a queue's tasks are published."""
    return f"{queue}.task"


def queue_of_subject(subject: str) -> str:
    """The queue whose task subject this is; inverse of `task_subject`."""
    return subject.removesuffix(".task")


def cancel_stream(queue: str, *, old_server: bool = False) -> str:
    """The stream that is created for a queue's cancels: Go NQ's ``<q>/cancel`` where the server (< 2.9) takes it."""
    return f"{queue}/cancel" if old_server else f"{queue}_cancel"


def schedule_subject(queue: str, task_id: str) -> str:
    """The subject on which a queue's task waits for its time (NATS ADR-51); the id becomes one token of it."""
    return f"{queue}.sched.{task_id.replace('.', '%2E')}"


def schedule_pattern(queue: str) -> str:
    """The subjects of all of a queue's schedules."""
    return f"{queue}.sched.*"


def cancel_subject(queue: str) -> str:
    """The subject on which a queue's cancels are multicast."""
    return f"{queue}.cancel"


def bucket_stream(bucket: str) -> str:
    """The stream behind a key-value bucket (NATS ADR-8)."""
    return f"KV_{bucket}"


def key_subject(bucket: str, key: str) -> str:
    """The subject of one key of a bucket (NATS ADR-8)."""
    return f"$KV.{bucket}.{key}"
