"""Define the names of streams, subjects and buckets, and check queue names and task ids.

NQ defines the stream ``<q>``, the subjects ``<q>.task`` and ``<q>.cancel``, the consumer ``MONITOR`` and the bucket
``nq-store``. nqnb adds the buckets ``nq-cancel``, ``nq-workers``, ``nq-results``, ``nq-limits``, ``nq-queues`` and
``nq-schedules``, and the stream ``nq-logs``.
"""

from __future__ import annotations

import functools
import hashlib
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
LIMIT_BUCKET = "nq-limits"
LOG_STREAM = "nq-logs"

CLIENT_HEADER = "Nqnb-Client"
"""The header of every message that nqnb publishes. Messages without this header come from other NQ clients."""

_QUEUE = re.compile(r"[A-Za-z0-9_-]{1,200}")
_TASK_ID = re.compile(r"[-/_=.a-zA-Z0-9]{1,200}")
_KEY = re.compile(r"[-/_=a-zA-Z0-9]+(?:\.[-/_=a-zA-Z0-9]+)*")
_LONGEST_KEY = 1000
_LONGEST_TASK_ID = 200
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_DIGEST_BYTES = 22
"""The number of bytes in the digest of a key. Each byte becomes one letter or digit."""
_LETTER_OF_BYTE = bytes(ord(_ALPHABET[byte % len(_ALPHABET)]) for byte in range(256))


def check_queue(queue: object) -> str:
    """Check a queue name, and return the name as a plain ``str``.

    Raises:
        InvalidQueueName: the name is not 1 to 200 characters long, contains a character other than letters (A-Z, a-z),
            digits, hyphens and underscores, or ends in ``_cancel``, the suffix of cancel streams.
    """
    if not isinstance(queue, str) or not _QUEUE.fullmatch(queue):
        raise InvalidQueueName(
            f"queue name {shown(queue)} is invalid: expected 1 to 200 characters, each a letter (A-Z, a-z), digit, "
            "hyphen or underscore.",
            queue,
        )
    if queue.endswith("_cancel"):
        raise InvalidQueueName(
            f"queue name {shown(queue)} is invalid: names ending in '_cancel' are reserved for cancel streams. "
            "Choose another name.",
            queue,
        )
    return exact_text(queue)


def check_task_id(task_id: object) -> str:
    """Check a task id, and return the id as a plain ``str``.

    Raises:
        InvalidTaskId: the id is not 1 to 200 characters long, contains a character other than letters (A-Z, a-z),
            digits and ``-/_=.``, or has a dot at the start, at the end or next to another dot.
    """
    if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
        raise InvalidTaskId(
            f"task id {shown(task_id)} is invalid: expected 1 to 200 characters, each a letter (A-Z, a-z), digit, dot, "
            "hyphen, slash, underscore or equals sign.",
            task_id,
        )
    if task_id.startswith(".") or task_id.endswith(".") or ".." in task_id:
        raise InvalidTaskId(
            f"task id {shown(task_id)} is invalid: it starts or ends with a dot, or contains two dots in a row. "
            "Remove the extra dot.",
            task_id,
        )
    return exact_text(task_id)


@functools.lru_cache(1000)
def is_queue(text: str) -> bool:
    """Return whether a string is a valid queue name."""
    return _QUEUE.fullmatch(text) is not None and not text.endswith("_cancel")


def is_key(text: str) -> bool:
    """Return whether a string is a valid key of a bucket.

    The server also accepts keys with wildcards, but a read or a purge of such a key would also match other keys.
    """
    return len(text) <= _LONGEST_KEY and _KEY.fullmatch(text) is not None


is_used_key = functools.lru_cache(10_000)(is_key)
"""The same as `is_key`, but faster for keys that are checked several times, such as the keys of running tasks."""


def is_task_id(text: str) -> bool:
    """Return whether a string is a valid task id: a valid key of at most 200 characters."""
    return len(text) <= _LONGEST_TASK_ID and is_key(text)


def new_task_id() -> str:
    """Generate a task id of 22 base-62 characters, like NQ's NUIDs, with 125 bits of randomness."""
    # Drawing each character separately would take a third of the time of a submission.
    return secrets.token_bytes(22).translate(_LETTER_OF_BYTE).decode()


def keyed_task_id(queue: str, key: str) -> str:
    """Return the id prefix of all tasks of a queue that have the same key. A dot and a number follow the prefix."""
    digest = hashlib.blake2b(f"{queue}\0{key}".encode(), digest_size=_DIGEST_BYTES).digest()
    return f"key-{digest.translate(_LETTER_OF_BYTE).decode()}"


def limits_key(queue: str) -> str:
    """Return the key of a queue's limits in the limits bucket."""
    return f"{queue}.limits"


def rate_key(queue: str) -> str:
    """Return the key of the record in which workers reserve the starts of a queue with a rate limit."""
    return f"{queue}.rate"


def slots_key(queue: str) -> str:
    """Return the key of the record that names the running tasks of a queue with a concurrency limit."""
    return f"{queue}.running"


def serial_key(queue: str, serial: str) -> str:
    """Return the key of the record that names the running task of a serial key."""
    digest = hashlib.blake2b(serial.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
    return f"{queue}.serial.{digest.translate(_LETTER_OF_BYTE).decode()}"


def is_serial_key(key: str, queue: str | None = None) -> bool:
    """Return whether a key of the limits bucket belongs to a serial key of ``queue``, or of any queue if None."""
    of_queue, _, digest = key.rpartition(".serial.")
    return bool(of_queue) and len(digest) == _DIGEST_BYTES and queue in (None, of_queue)


def task_stream(queue: str) -> str:
    """Return the name of the stream to create for a queue's tasks. Existing streams are found by subject instead."""
    return queue


def task_subject(queue: str) -> str:
    """Return the subject of a queue's tasks."""
    return f"{queue}.task"


def queue_of_subject(subject: str) -> str:
    """Return the queue name from a task subject. This is the inverse of `task_subject`."""
    return subject.removesuffix(".task")


def cancel_stream(queue: str, *, old_server: bool = False) -> str:
    """Return the name of the stream to create for a queue's cancels.

    On servers before version 2.9, this is the same name as in Go NQ, ``<q>/cancel``.
    """
    return f"{queue}/cancel" if old_server else f"{queue}_cancel"


def schedule_subject(queue: str, task_id: str) -> str:
    """Return the subject of a task's schedule (NATS ADR-51). The task id forms a single token of the subject."""
    return f"{queue}.sched.{task_id.replace('.', '%2E')}"


def schedule_pattern(queue: str) -> str:
    """Return the wildcard subject that matches all of a queue's schedules."""
    return f"{queue}.sched.*"


def cancel_subject(queue: str) -> str:
    """Return the subject of a queue's cancels."""
    return f"{queue}.cancel"


def log_subject(task_id: str) -> str:
    """Return the subject of a task's log. No queue has this subject, because queue names cannot contain ``$``."""
    return f"$NQNB.logs.{task_id}"


def bucket_stream(bucket: str) -> str:
    """Return the name of the stream that stores a key-value bucket (NATS ADR-8)."""
    return f"KV_{bucket}"


def key_subject(bucket: str, key: str) -> str:
    """Return the subject of a key in a bucket (NATS ADR-8)."""
    return f"$KV.{bucket}.{key}"
