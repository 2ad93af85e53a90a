"""Every error that nqnb raises, as one tree.

::

    NqnbError
    ├── BadInput                  a value that the caller gave is invalid (also a ValueError)
    │   ├── InvalidQueueName
    │   ├── InvalidTaskId
    │   ├── InvalidHandler        a function that cannot handle tasks
    │   ├── UnencodableValue      a payload or result without a JSON form
    │   └── PayloadTooLarge       payload and headers above the server's limit
    ├── ConnectionFailed          the server cannot be used now (also a ConnectionError)
    │   ├── NoServer              no server at the address accepted the connection
    │   ├── NoJetStream           the server accepted, but JetStream is off
    │   └── NoResponders          nothing serves the subject now; nothing was stored
    │       └── Unavailable       JetStream answers "not now": no leader, no quorum; has ``.err_code``
    │           └── NoRoom        a storage limit is reached
    ├── Unconfirmed               the server's answer was lost: the request may have taken effect
    ├── ServerRefused             the server refused the request, or the user lacks the permission
    ├── RevisionConflict          a compare-and-set lost against a newer write
    ├── MalformedMessage          bytes that are not an NQ message
    ├── UnknownQueue              no such queue on the server; has ``.queue``
    ├── QueueInUse                not deleted, because it has tasks or workers; has ``.queue``
    ├── TaskError                 about one task; has ``.task_id``
    │   ├── UnknownTask
    │   ├── TaskExists            another task has the id
    │   ├── NotCancellable        completed or failed before the cancel; has ``.status``
    │   ├── NotRequeueable        not ended yet, or its payload is not kept; has ``.status``
    │   ├── TaskFailed            raised where the result is requested
    │   ├── TaskCancelled         raised where the result is requested
    │   └── WaitTimeout           not terminal in time (also a TimeoutError)
    ├── NotSubmitted              part of a ``submit_many``; has ``.tasks`` and ``.errors``
    └── DevServerError            the bundled nats-server cannot be found or did not start

``JobCancelled`` is outside of the tree and outside of ``Exception``: it is raised *inside* a handler that must stop,
and must pass through its ``except Exception`` as ``asyncio.CancelledError`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nqnb.protocol.status import Status


class NqnbError(Exception):
    """The base class of every error that nqnb raises."""


class BadInput(NqnbError, ValueError):
    """A value that the caller gave is invalid; nothing was sent."""


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
    """A function that cannot handle tasks, or options that do not fit it."""


class UnencodableValue(BadInput):
    """A part of the value has no JSON form; ``.part`` names the part, such as ``payload["rows"][3]``."""

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
    """The server cannot be used now."""


class NoServer(ConnectionFailed):
    """No server at the address accepted the connection; ``.url`` is the address, without secrets."""

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url


class NoJetStream(ConnectionFailed):
    """The server accepted the connection, but JetStream is off."""


class NoResponders(ConnectionFailed):
    """Nothing serves the subject at this moment, so nothing was stored; ``.subject`` is the subject."""

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Unavailable(NoResponders):
    """JetStream is unavailable at this moment, so nothing was stored; the same request may succeed later.

    A cluster without a leader or a quorum answers so. ``.code``, ``.err_code`` and ``.description`` are JetStream's
    own, as in `ServerRefused`; ``.subject`` names the request.
    """

    def __init__(self, message: str, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message, subject)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoRoom(Unavailable):
    """A storage limit of the server, the account or a stream is reached; the message says how to free room."""


class Unconfirmed(NqnbError):
    """The answer of the server was lost: the request may have taken effect; ``.task_id`` is set if it is known."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ServerRefused(NqnbError):
    """The server refused a request; ``.err_code`` is JetStream's code, ``.description`` its text.

    If the user lacks the permission, ``.code`` is 403 and ``.err_code`` is 0.
    """

    def __init__(self, message: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message)
        self.code = code
        self.err_code = err_code
        self.description = description


class RevisionConflict(NqnbError):
    """A compare-and-set lost: the key has another revision; ``.key`` is the key."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"writing the entry {key!r} failed: another client or worker wrote it meanwhile. Read it again."
        )
        self.key = key


class MalformedMessage(NqnbError):
    """Bytes that are not the expected NQ message; ``.data`` holds them."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class UnknownQueue(NqnbError):
    """No stream on the server stores that queue's tasks; ``.queue`` is its name."""

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


class QueueInUse(NqnbError):
    """A queue was not deleted, because it still has tasks or workers.

    ``.queue`` is its name. ``.pending``, ``.processing`` and ``.workers`` count its waiting tasks, its running tasks
    and its live workers.
    """

    def __init__(self, message: str, queue: str, pending: int = 0, processing: int = 0, workers: int = 0) -> None:
        super().__init__(message)
        self.queue = queue
        self.pending = pending
        self.processing = processing
        self.workers = workers


class TaskError(NqnbError):
    """An error about one task; ``.task_id`` names it, and ``.status`` is its state if that is known."""

    def __init__(self, message: str, task_id: str, status: Status | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.status = status


class UnknownTask(TaskError):
    """The state bucket has no task of that id."""


class TaskExists(TaskError):
    """Another task has the id that the caller chose."""


class NotCancellable(TaskError):
    """The task completed or failed before it could be cancelled; ``.status`` says which."""


class NotRequeueable(TaskError):
    """The task cannot be submitted again: it has not ended, or its payload is not kept; ``.status`` is its state."""


class TaskFailed(TaskError):
    """The task failed; ``.error_type`` and ``.traceback`` describe the handler's exception, as text."""

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
    """The task did not end within the timeout; it continues."""


class NotSubmitted(NqnbError):
    """Some tasks of a ``submit_many`` were not accepted.

    ``.tasks`` has a `Task` or None for each payload, in order; ``.errors`` maps the position of each None to its error.
    """

    def __init__(self, message: str, tasks: Sequence[Any], errors: Mapping[int, NqnbError]) -> None:
        super().__init__(message)
        self.tasks = tasks
        self.errors = errors


class DevServerError(NqnbError):
    """The bundled nats-server cannot be found, did not start, or stopped by itself."""


class JobCancelled(BaseException):
    """Raised inside a handler whose task is being stopped, so that it unwinds; do not catch it."""
