"""Every error that nqnb raises, as one tree.

::

    NqnbError
    ├── BadInput                  a value that the caller passed is invalid (also a ValueError)
    │   ├── InvalidQueueName
    │   ├── InvalidTaskId
    │   ├── InvalidHandler        a function that cannot handle tasks
    │   ├── UnencodableValue      a payload or result without a JSON form
    │   └── PayloadTooLarge       the payload and headers exceed the server's limit
    ├── ConnectionFailed          the server cannot be used at the moment (also a ConnectionError)
    │   ├── NoServer              no server at the address accepted the connection
    │   ├── NoJetStream           the server accepted the connection, but JetStream is not enabled
    │   └── NoResponders          nothing is serving the subject at the moment; nothing was stored
    │       └── Unavailable       JetStream has no leader or no quorum at the moment; has ``.err_code``
    │           └── NoRoom        a storage limit was reached
    ├── Unconfirmed               the server's answer was lost: the request may have taken effect
    ├── ServerRefused             the server refused the request, or the user lacks the permission
    ├── RevisionConflict          a compare-and-set failed because of a newer write
    ├── MalformedMessage          the bytes are not an NQ message
    ├── UnknownQueue              the server has no such queue; has ``.queue``
    ├── QueueInUse                the queue has tasks or workers, so it was not deleted; has ``.queue``
    ├── TaskError                 an error about one task; has ``.task_id``
    │   ├── UnknownTask           the state bucket has no such task
    │   ├── TaskExists            another task has the id
    │   ├── NotCancellable        the task completed or failed before the cancel; has ``.status``
    │   ├── NotRequeueable        the task has not ended, or its payload is no longer stored; has ``.status``
    │   ├── TaskFailed            the task failed, so it has no result
    │   ├── TaskCancelled         the task was cancelled or deleted, so it has no result
    │   └── WaitTimeout           the task did not end in time (also a TimeoutError)
    ├── NotSubmitted              some tasks of a ``submit_many`` failed; has ``.tasks`` and ``.errors``
    └── DevServerError            the bundled nats-server cannot be found or did not start

``JobCancelled`` is not part of the tree, and does not derive from ``Exception``. It is raised *inside* a handler that
must stop. Like ``asyncio.CancelledError``, it is not caught by an ``except Exception`` in the handler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nqnb.protocol.status import Status


class NqnbError(Exception):
    """The base class of every error that nqnb raises."""


class BadInput(NqnbError, ValueError):
    """A value that the caller passed is invalid; nothing was sent."""


class InvalidQueueName(BadInput):
    """A queue name that NQ or NATS does not allow; ``.queue`` is the name."""

    def __init__(self, message: str, queue: object) -> None:
        super().__init__(message)
        self.queue = queue


class InvalidTaskId(BadInput):
    """A task id that is not allowed as a key of the state bucket; ``.task_id`` is the id."""

    def __init__(self, message: str, task_id: object) -> None:
        super().__init__(message)
        self.task_id = task_id


class InvalidHandler(BadInput):
    """A function that cannot handle tasks, or handler options that do not suit the function."""


class UnencodableValue(BadInput):
    """Part of a value has no JSON form; ``.part`` names that part, such as ``payload["rows"][3]``."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class PayloadTooLarge(BadInput):
    """The message would be larger than the server accepts; ``.size`` and ``.limit`` are in bytes."""

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
    """Nothing is serving the subject at the moment, so nothing was stored; ``.subject`` is the subject."""

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Unavailable(NoResponders):
    """JetStream is unavailable at the moment, so nothing was stored; the same request may succeed later.

    A cluster that has no leader or no quorum reports this. ``.code``, ``.err_code`` and ``.description`` come from
    JetStream, as in `ServerRefused`; ``.subject`` is the subject of the request.
    """

    def __init__(self, message: str, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message, subject)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoRoom(Unavailable):
    """A storage limit of the server, the account or a stream was reached; the message says how to free space."""


class Unconfirmed(NqnbError):
    """The server's answer was lost, so the request may have taken effect; ``.task_id`` is set if it is known."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ServerRefused(NqnbError):
    """The server refused a request; ``.err_code`` and ``.description`` are JetStream's error code and its text.

    If the user lacks the permission, ``.code`` is 403 and ``.err_code`` is 0.
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
            f"writing the entry {key!r} failed: another client or worker has changed it. Read the entry and try again."
        )
        self.key = key


class MalformedMessage(NqnbError):
    """The bytes are not the expected NQ message; ``.data`` has the bytes."""

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

    ``.queue`` is the name of the queue. ``.pending``, ``.processing`` and ``.workers`` are the numbers of its waiting
    tasks, running tasks and live workers.
    """

    def __init__(self, message: str, queue: str, pending: int = 0, processing: int = 0, workers: int = 0) -> None:
        super().__init__(message)
        self.queue = queue
        self.pending = pending
        self.processing = processing
        self.workers = workers


class TaskError(NqnbError):
    """An error about one task; ``.task_id`` is the id of the task, and ``.status`` is its state or None if unknown."""

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
    """The task failed; ``.error_type`` and ``.traceback`` are strings that describe the handler's exception."""

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


class TaskCancelled(TaskError):
    """The task was cancelled (or deleted before it started), so it has no result."""


class WaitTimeout(TaskError, TimeoutError):
    """The task did not end within the timeout; the task continues."""


class NotSubmitted(NqnbError):
    """Some tasks of a ``submit_many`` were not accepted.

    ``.tasks`` has a `Task` or None for each payload, in order. ``.errors`` maps the index of each rejected payload to
    its error.
    """

    def __init__(self, message: str, tasks: Sequence[Any], errors: Mapping[int, NqnbError]) -> None:
        super().__init__(message)
        self.tasks = tasks
        self.errors = errors


class DevServerError(NqnbError):
    """The bundled nats-server cannot be found, did not start, or stopped unexpectedly."""


class JobCancelled(BaseException):
    """The exception that is raised inside a handler to stop its task. A handler must not suppress it."""
