"""Every error that nqnb raises, as one tree.

::

    NqnbError
    ├── BadInput                  a value that the caller gave cannot be used (also a ValueError)
    │   ├── InvalidQueueName
    │   ├── InvalidTaskId
    │   ├── InvalidHandler        a function that cannot handle tasks
    │   ├── UnencodableValue      a payload or result that JSON cannot carry
    │   └── PayloadTooLarge       payload and headers above the server's limit
    ├── ConnectionFailed          no conversation with the server (also a ConnectionError)
    │   ├── NoServer              nothing answers at the address, or it turns us away
    │   ├── NoJetStream           a server, but JetStream is off
    │   └── NoResponders          nobody serves that subject now; nothing was stored
    │       └── Unavailable       JetStream answers "not now": no leader, no quorum; has ``.err_code``
    │           └── NoRoom        a storage limit is reached
    ├── Unconfirmed               the server's answer was lost: it may or may not have happened
    ├── ServerRefused             the server refused what was asked, or our user may not ask it
    ├── RevisionConflict          a compare-and-set lost against a newer write
    ├── MalformedMessage          bytes that are not an NQ message
    ├── UnknownQueue              no such queue on the server; has ``.queue``
    ├── QueueInUse                not deleted, there is still something; has ``.queue``
    ├── TaskError                 about one task; has ``.task_id``
    │   ├── UnknownTask
    │   ├── TaskExists            the id is taken
    │   ├── NotCancellable        completed or failed before the cancel; has ``.status``
    │   ├── NotRequeueable        not ended yet, or without its payload; has ``.status``
    │   ├── TaskFailed            raised to whoever asks for the result
    │   ├── TaskCancelled         raised to whoever asks for the result
    │   └── WaitTimeout           not terminal in time (also a TimeoutError)
    ├── NotSubmitted              some of ``submit_many``; has ``.tasks`` and ``.errors``
    └── DevServerError            the bundled nats-server cannot be found or did not start

``JobCancelled`` stands outside of the tree and outside of ``Exception``: it is raised *inside* a handler that is
to stop, and must pass through its ``except Exception`` as ``asyncio.CancelledError`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nqnb.protocol.status import Status


class NqnbError(Exception):
    """The root of every error that nqnb raises on its own."""


class BadInput(NqnbError, ValueError):
    """A value given by the caller cannot be used; nothing was sent."""


class InvalidQueueName(BadInput):
    """A queue name that NQ or NATS cannot carry; ``.queue`` is the name."""

    def __init__(self, message: str, queue: object) -> None:
        super().__init__(message)
        self.queue = queue


class InvalidTaskId(BadInput):
    """A task id that the state bucket cannot carry as a key; ``.task_id`` is the id."""

    def __init__(self, message: str, task_id: object) -> None:
        super().__init__(message)
        self.task_id = task_id


class InvalidHandler(BadInput):
    """A function, or the options beside it, that cannot handle tasks."""


class UnencodableValue(BadInput):
    """JSON cannot carry a part of the value; ``.part`` is where it stands, such as ``payload["rows"][3]``."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class PayloadTooLarge(BadInput):
    """The message would be larger than the server takes; ``.size`` and ``.limit`` are in bytes."""

    def __init__(self, message: str, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ConnectionFailed(NqnbError, ConnectionError):
    """No conversation with the server is possible now."""


class NoServer(ConnectionFailed):
    """Nothing answers at the address, or what answers turns us away; ``.url`` is the address, without secrets."""

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url


class NoJetStream(ConnectionFailed):
    """The server answers, but JetStream is off there."""


class NoResponders(ConnectionFailed):
    """Nobody serves the subject at this moment, so nothing was stored; ``.subject`` is the subject."""

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Unavailable(NoResponders):
    """JetStream cannot do it at this moment, so nothing was stored; the same request may succeed later.

    A cluster answers so without a leader or a quorum. ``.code``, ``.err_code`` and ``.description`` are JetStream's
    own, as in `ServerRefused`; ``.subject`` says what was asked.
    """

    def __init__(self, message: str, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message, subject)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoRoom(Unavailable):
    """A storage limit is reached, of the server, the account or one stream; the message says what frees room."""


class Unconfirmed(NqnbError):
    """The answer of the server was lost: what was asked may have happened or not; ``.task_id`` where it is known."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ServerRefused(NqnbError):
    """The server refused a request; ``.err_code`` is JetStream's own number, ``.description`` its words.

    Where our user lacks the permission to ask, ``.code`` is 403 and ``.err_code`` 0.
    """

    def __init__(self, message: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message)
        self.code = code
        self.err_code = err_code
        self.description = description


class RevisionConflict(NqnbError):
    """A compare-and-set lost: the key has another revision; ``.key`` is the key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the entry {key!r} was written by somebody else meanwhile; read it again")
        self.key = key


class MalformedMessage(NqnbError):
    """Bytes that are not the NQ message they should be; ``.data`` holds them."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class UnknownQueue(NqnbError):
    """No stream on the server takes that queue's tasks; ``.queue`` is its name."""

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


class QueueInUse(NqnbError):
    """A queue was not deleted, for there is still something.

    ``.queue`` is its name, ``.pending`` how many tasks wait, ``.processing`` how many run, ``.workers`` how many live
    workers serve it.
    """

    def __init__(self, message: str, queue: str, pending: int = 0, processing: int = 0, workers: int = 0) -> None:
        super().__init__(message)
        self.queue = queue
        self.pending = pending
        self.processing = processing
        self.workers = workers


class TaskError(NqnbError):
    """About one task; ``.task_id`` names it and ``.status`` is its state where that is known."""

    def __init__(self, message: str, task_id: str, status: Status | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.status = status


class UnknownTask(TaskError):
    """No task of that id is in the state bucket."""


class TaskExists(TaskError):
    """The id that the caller chose belongs to another task."""


class NotCancellable(TaskError):
    """The task completed or failed before it could be cancelled; ``.status`` says which."""


class NotRequeueable(TaskError):
    """The task cannot be submitted again: it has not ended, or its payload is not kept; ``.status`` is its state."""


class TaskFailed(TaskError):
    """The task failed; ``.error_type`` and ``.traceback`` are those of the handler's exception, as text."""

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
    """The task was not terminal within the time given; it goes on."""


class NotSubmitted(NqnbError):
    """Some of the tasks of a ``submit_many`` were not accepted.

    ``.tasks`` has a `Task` or None for each payload, in order; ``.errors`` maps the position of each None to its error.
    """

    def __init__(self, message: str, tasks: Sequence[Any], errors: Mapping[int, NqnbError]) -> None:
        super().__init__(message)
        self.tasks = tasks
        self.errors = errors


class DevServerError(NqnbError):
    """The bundled nats-server cannot be found, did not start, or stopped by itself."""


class JobCancelled(BaseException):
    """Raised inside a handler whose task is being stopped, so that it unwinds; let it pass."""
