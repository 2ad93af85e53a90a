"""All errors that nqnb raises, in one hierarchy.

::

    NqnbError
    ├── BadInput                  a value that the caller passed is invalid (also a ValueError)
    │   ├── InvalidQueueName
    │   ├── InvalidTaskId
    │   ├── InvalidHandler        the function cannot be used as a handler
    │   ├── UnencodableValue      the payload or result cannot be encoded as JSON
    │   └── PayloadTooLarge       the payload and headers exceed the server's limit
    ├── ConnectionFailed          the server cannot be used at the moment (also a ConnectionError)
    │   ├── NoServer              no server at the address accepted the connection
    │   ├── NoJetStream           the server accepted the connection, but JetStream is not enabled
    │   └── NoResponders          nothing is listening on the subject at the moment; nothing was stored
    │       └── Unavailable       JetStream has no leader or no quorum at the moment (see ``.err_code``)
    │           └── NoRoom        a storage limit was reached
    ├── Unconfirmed               the server's answer was lost: the request may have taken effect
    ├── ServerRefused             the server refused the request, for example because of a missing permission
    ├── RevisionConflict          a compare-and-set failed because of a newer write
    ├── MalformedMessage          bytes from the server are not a valid NQ message
    ├── UnknownQueue              the server has no such queue (see ``.queue``)
    ├── QueueInUse                the queue was not deleted because it has tasks or workers (see ``.queue``)
    ├── UnknownSchedule           the server has no schedule with this name (see ``.name``)
    ├── ScheduleExists            a schedule with this name has another definition (see ``.name``)
    ├── TaskError                 an error that concerns one task (see ``.task_id``)
    │   ├── UnknownTask           the state bucket has no such task
    │   ├── TaskExists            another task already has this id
    │   ├── NotCancellable        the task completed or failed before the cancel (see ``.status``)
    │   ├── NotRequeueable        the task has not ended, or its payload is no longer stored (see ``.status``)
    │   ├── TaskFailed            the task failed, so it has no result
    │   ├── TaskCancelled         the task was cancelled or deleted, so it has no result
    │   └── WaitTimeout           the task did not end in time (also a TimeoutError)
    ├── NotSubmitted              ``submit_many`` could not submit some tasks (see ``.tasks`` and ``.errors``)
    ├── MetricsUnavailable        the metrics cannot be served: an extra is missing, or the address cannot be used
    ├── HealthUnavailable         the health checks cannot be served, because the address cannot be used
    ├── TracingUnavailable        tasks cannot be traced: an extra is missing
    └── DevServerError            the bundled nats-server cannot be found or did not start

``JobCancelled`` is not part of this hierarchy. nqnb raises this exception inside a handler to stop the handler. Like
``asyncio.CancelledError``, it derives from ``BaseException``, so ``except Exception`` does not catch it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nqnb.error_text import readable
from nqnb.protocol.status import Status

_NOTE_LINE_CHARACTERS = 500


class NqnbError(Exception):
    """The base class of every error that nqnb raises."""


class BadInput(NqnbError, ValueError):
    """The caller passed an invalid value; nothing was sent to the server."""


class InvalidQueueName(BadInput):
    """NQ or NATS does not allow the queue name; ``.queue`` is the name."""

    def __init__(self, message: str, queue: object) -> None:
        super().__init__(message)
        self.queue = queue


class InvalidTaskId(BadInput):
    """The task id cannot be used as a key in the state bucket; ``.task_id`` is the id."""

    def __init__(self, message: str, task_id: object) -> None:
        super().__init__(message)
        self.task_id = task_id


class InvalidHandler(BadInput):
    """The function cannot be used as a handler, or an option is invalid for this handler."""


class UnencodableValue(BadInput):
    """Part of a value cannot be encoded as JSON; ``.part`` names that part, for example ``payload["rows"][3]``."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class PayloadTooLarge(BadInput):
    """The message exceeds the server's size limit; ``.size`` and ``.limit`` are in bytes."""

    def __init__(self, message: str, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ConnectionFailed(NqnbError, ConnectionError):
    """The server cannot be used at the moment."""


class NoServer(ConnectionFailed):
    """No server at the address accepted the connection; ``.url`` is the address, without secrets."""

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url


class NoJetStream(ConnectionFailed):
    """The server accepted the connection, but JetStream is not enabled."""


class NoResponders(ConnectionFailed):
    """Nothing is listening on the subject at the moment, so nothing was stored; ``.subject`` is the subject."""

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Unavailable(NoResponders):
    """JetStream is unavailable at the moment, so nothing was stored; the same request may succeed later.

    The usual cause is a cluster without a leader or without a quorum. ``.code``, ``.err_code`` and ``.description``
    come from JetStream, as in `ServerRefused`. ``.subject`` is the subject of the request.
    """

    def __init__(self, message: str, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message, subject)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoRoom(Unavailable):
    """A storage limit of the server, the account or a stream was reached. The message explains how to free space."""


class Unconfirmed(NqnbError):
    """The server's answer was lost, so the request may have taken effect; ``.task_id`` is the task's id, if known."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ServerRefused(NqnbError):
    """The server refused a request; ``.err_code`` and ``.description`` are JetStream's error code and description.

    If the user does not have the required permission, ``.code`` is 403 and ``.err_code`` is 0.
    """

    def __init__(self, message: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message)
        self.code = code
        self.err_code = err_code
        self.description = description


class RevisionConflict(NqnbError):
    """A compare-and-set failed because the key has a newer revision; ``.key`` is the key."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"writing the entry {key!r} failed: another client or worker has changed the entry. "
            "Read the entry again, and retry."
        )
        self.key = key


class MalformedMessage(NqnbError):
    """Bytes from the server are not a valid NQ message or entry; ``.data`` contains these bytes."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class UnknownQueue(NqnbError):
    """The server has no stream for the queue; ``.queue`` is the name of the queue."""

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


class QueueInUse(NqnbError):
    """A queue was not deleted because it still has tasks or workers.

    ``.queue`` is the name of the queue. ``.pending``, ``.processing`` and ``.workers`` are the numbers of waiting
    tasks, running tasks and live workers.
    """

    def __init__(self, message: str, queue: str, pending: int = 0, processing: int = 0, workers: int = 0) -> None:
        super().__init__(message)
        self.queue = queue
        self.pending = pending
        self.processing = processing
        self.workers = workers


class UnknownSchedule(NqnbError):
    """The server has no schedule with this name; ``.name`` is the name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class ScheduleExists(NqnbError):
    """A schedule with this name has another definition; ``.name`` is the name."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class TaskError(NqnbError):
    """An error that concerns one task; ``.task_id`` is the task's id, and ``.status`` is its state, if known."""

    def __init__(self, message: str, task_id: str, status: Status | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.status = status


class UnknownTask(TaskError):
    """The state bucket has no task with this id."""


class TaskExists(TaskError):
    """Another task already has the id that the caller chose."""


class NotCancellable(TaskError):
    """The task completed or failed before it could be cancelled; ``.status`` is its state."""


class NotRequeueable(TaskError):
    """The task cannot be requeued: it has not ended, or its payload is no longer stored; ``.status`` is its state."""


class TaskFailed(TaskError):
    """The task failed; ``.error_type`` and ``.traceback`` are strings that describe the handler's exception.

    Notebooks, and Python 3.11 and later, print the handler's traceback as a note below the message.
    """

    def __init__(
        self,
        message: str,
        task_id: str,
        status: Status | None = None,
        error_type: str | None = None,
        traceback: str | None = None,
    ) -> None:
        super().__init__(message, task_id, status)
        self.error_type = error_type
        self.traceback = traceback
        if traceback and not traceback.isspace():
            # `add_note` does not exist in Python 3.10, but notebooks print the notes in Python 3.10 too.
            self.__notes__ = [f"\n{_note(traceback)}"]


def _note(traceback: str) -> str:
    """Return the handler's traceback, with a heading that distinguishes it from the caller's traceback."""
    lines = [readable(each.expandtabs(4), _NOTE_LINE_CHARACTERS) for each in traceback.rstrip().splitlines()]
    if lines[0].startswith("Traceback "):
        lines[0] = "The handler's traceback (most recent call last):"
    else:
        lines.insert(0, "The handler's traceback:")
    return "\n".join(lines)


class TaskCancelled(TaskError):
    """The task was cancelled (or deleted before it started), so it has no result."""


class WaitTimeout(TaskError, TimeoutError):
    """The task did not end within the timeout. The task itself is not affected."""


class NotSubmitted(NqnbError):
    """Some tasks of a ``submit_many`` call could not be submitted.

    ``.tasks`` has an item for each payload, in the same order: a `Task`, or None for a failed payload. ``.errors`` maps
    the index of each failed payload to the error.
    """

    def __init__(self, message: str, tasks: Sequence[Any], errors: Mapping[int, NqnbError]) -> None:
        super().__init__(message)
        self.tasks = tasks
        self.errors = errors


class DevServerError(NqnbError):
    """The bundled nats-server cannot be found, did not start, or stopped unexpectedly."""


class MetricsUnavailable(NqnbError):
    """The metrics cannot be served: prometheus-client is not installed, or the address cannot be used."""


class HealthUnavailable(NqnbError):
    """The health checks cannot be served, because the address cannot be used."""


class TracingUnavailable(NqnbError):
    """Tasks cannot be traced: opentelemetry-api is not installed."""


class JobCancelled(BaseException):
    """The exception that nqnb raises inside a handler to stop the handler. Handlers must not suppress it."""
