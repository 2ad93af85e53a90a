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
    ├── ScheduleExists            a schedule of this name exists, with a different definition (see ``.name``)
    ├── TaskError                 an error that concerns one task (see ``.task_id``)
    │   ├── UnknownTask           the state bucket has no such task
    │   ├── TaskExists            another task already has this id or key
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
    """The base class of every error that nqnb raises.

    Examples:
        >>> try:
        ...     await nq.fetch("no-such-task")
        ... except nqnb.NqnbError as error:  # any error of nqnb
        ...     print(error)
        task 'no-such-task' is unknown: this server has no task with that id. Check the id and the server, or run
        `nqnb task list` to see the existing tasks.
    """


class BadInput(NqnbError, ValueError):
    """The caller passed an invalid value; nothing was sent to the server.

    Examples:
        >>> await nq.submit("resize", timeout=-1)
        Traceback (most recent call last):
            ...
        nqnb.errors.BadInput: timeout=-1 is invalid: must be above 0. Pass seconds or a timedelta.
    """


class InvalidQueueName(BadInput):
    """NQ or NATS does not allow the queue name; ``.queue`` is the name.

    Examples:
        >>> await nq.submit("re size")
        Traceback (most recent call last):
            ...
        nqnb.errors.InvalidQueueName: queue name 're size' is invalid: expected 1 to 200 characters, each a letter (A-Z,
        a-z), digit, hyphen or underscore.
    """

    def __init__(self, message: str, queue: object) -> None:
        super().__init__(message)
        self.queue = queue


class InvalidTaskId(BadInput):
    """The task id cannot be used as a key in the state bucket; ``.task_id`` is the id.

    Examples:
        >>> await nq.fetch("a b")
        Traceback (most recent call last):
            ...
        nqnb.errors.InvalidTaskId: task id 'a b' is invalid: expected 1 to 200 characters, each a letter (A-Z, a-z),
        digit, dot, hyphen, slash, underscore or equals sign.
    """

    def __init__(self, message: str, task_id: object) -> None:
        super().__init__(message)
        self.task_id = task_id


class InvalidHandler(BadInput):
    """The function cannot be used as a handler, or an option is invalid for this handler.

    Examples:
        >>> @nqnb.Worker().handler("resize")
        ... def resize(path, width, height): ...
        Traceback (most recent call last):
            ...
        nqnb.errors.InvalidHandler: resize(path, width, height) cannot handle tasks: its parameters must be (job),
        (payload) or (job, payload).
    """


class UnencodableValue(BadInput):
    """Part of a value cannot be encoded as JSON; ``.part`` names that part, for example ``payload["rows"][3]``.

    Examples:
        >>> try:
        ...     await nq.submit("resize", {"rows": [1, 2, open]})
        ... except nqnb.UnencodableValue as error:
        ...     print(error.part)
        payload['rows'][2]
    """

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class PayloadTooLarge(BadInput):
    """The message exceeds the server's size limit; ``.size`` and ``.limit`` are in bytes.

    Examples:
        >>> try:
        ...     await nq.submit("resize", bytes(2_000_000))
        ... except nqnb.PayloadTooLarge as error:
        ...     print(error.size > error.limit, error.limit)
        True 1048576
    """

    def __init__(self, message: str, size: int, limit: int) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ConnectionFailed(NqnbError, ConnectionError):
    """The server cannot be used at the moment.

    Examples:
        >>> try:
        ...     await nqnb.connect("nats://127.0.0.1:1", connect_timeout=1)
        ... except nqnb.ConnectionFailed as error:  # also a ConnectionError
        ...     print(type(error).__name__)
        NoServer
    """


class NoServer(ConnectionFailed):
    """No server at the address accepted the connection; ``.url`` is the address, without secrets.

    Examples:
        >>> await nqnb.connect("nats://127.0.0.1:1", connect_timeout=1)
        Traceback (most recent call last):
            ...
        nqnb.errors.NoServer: cannot connect to a NATS server at nats://127.0.0.1:1: the connection was refused; start a
        server with `nqnb up --detach`, or set another address with --url or NATS_URL
    """

    def __init__(self, message: str, url: str) -> None:
        super().__init__(message)
        self.url = url


class NoJetStream(ConnectionFailed):
    """The server accepted the connection, but JetStream is not enabled.

    Examples:
        >>> with nqnb.DevServer(jetstream=False) as server:
        ...     await nqnb.connect(server.url)
        Traceback (most recent call last):
            ...
        nqnb.errors.NoJetStream: cannot use the server at nats://...: JetStream is not enabled. Restart the server with
        `-js`, or start another server with `nqnb up`.
    """


class NoResponders(ConnectionFailed):
    """Nothing is listening on the subject at the moment, so nothing was stored; ``.subject`` is the subject.

    Examples:
        >>> async def submit(payload):
        ...     try:
        ...         return await nq.submit("resize", payload, key=payload["path"])
        ...     except nqnb.NoResponders as error:
        ...         print("nothing was stored:", error)
        >>> await (await submit({"path": "c.png"}))
        {'path': 'c.png', 'width': 800}
    """

    def __init__(self, message: str, subject: str) -> None:
        super().__init__(message)
        self.subject = subject


class Unavailable(NoResponders):
    """JetStream is unavailable at the moment, so nothing was stored; the same request may succeed later.

    The usual cause is a cluster without a leader or without a quorum. ``.code``, ``.err_code`` and ``.description``
    come from JetStream, as in `ServerRefused`. ``.subject`` is the subject of the request.

    Examples:
        >>> async def submit(payload):
        ...     try:
        ...         return await nq.submit("resize", payload, key=payload["path"])
        ...     except nqnb.Unavailable as error:
        ...         print("try again later:", error.err_code)
        >>> await (await submit({"path": "d.png"}))
        {'path': 'd.png', 'width': 800}
    """

    def __init__(self, message: str, subject: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message, subject)
        self.code = code
        self.err_code = err_code
        self.description = description


class NoRoom(Unavailable):
    """A storage limit of the server, the account or a stream was reached. The message explains how to free space.

    Examples:
        >>> async def submit(payload):
        ...     try:
        ...         return await nq.submit("resize", payload, key=payload["path"])
        ...     except nqnb.NoRoom as error:
        ...         print("free space, then submit again:", error)
        >>> await (await submit({"path": "g.png"}))
        {'path': 'g.png', 'width': 800}
    """


class Unconfirmed(NqnbError):
    """The server's answer was lost, so the request may have taken effect; ``.task_id`` is the task's id, if known.

    Examples:
        >>> async def submit(payload):
        ...     try:
        ...         return await nq.submit("resize", payload, key=payload["path"])
        ...     except nqnb.Unconfirmed as error:
        ...         print("read the state of task", error.task_id)
        >>> await (await submit({"path": "e.png"}))
        {'path': 'e.png', 'width': 800}
    """

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class ServerRefused(NqnbError):
    """The server refused a request; ``.err_code`` and ``.description`` are JetStream's error code and description.

    If the user does not have the required permission, ``.code`` is 403 and ``.err_code`` is 0.

    Examples:
        >>> async def submit(payload):
        ...     try:
        ...         return await nq.submit("resize", payload, key=payload["path"])
        ...     except nqnb.ServerRefused as error:
        ...         print(error.code, error.description)
        >>> await (await submit({"path": "f.png"}))
        {'path': 'f.png', 'width': 800}
    """

    def __init__(self, message: str, code: int, err_code: int, description: str) -> None:
        super().__init__(message)
        self.code = code
        self.err_code = err_code
        self.description = description


class RevisionConflict(NqnbError):
    """A compare-and-set failed because the key has a newer revision; ``.key`` is the key.

    Examples:
        >>> store = nqnb.MemoryStore()
        >>> revision = await store.create("task", b"pending")
        >>> await store.create("task", b"pending")
        Traceback (most recent call last):
            ...
        nqnb.errors.RevisionConflict: writing the entry 'task' failed: another client or worker has changed the entry.
        Read the entry again, and retry.
    """

    def __init__(self, key: str) -> None:
        super().__init__(
            f"writing the entry {key!r} failed: another client or worker has changed the entry. "
            "Read the entry again, and retry."
        )
        self.key = key


class MalformedMessage(NqnbError):
    """Bytes from the server are not a valid NQ message or entry; ``.data`` contains these bytes.

    Examples:
        >>> nqnb.TaskMessage.decode(b"[]")
        Traceback (most recent call last):
            ...
        nqnb.errors.MalformedMessage: cannot decode an NQ message: it is not a JSON object (b'[]'). Check which program
        wrote these bytes.
    """

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class UnknownQueue(NqnbError):
    """The server has no stream for the queue; ``.queue`` is the name of the queue.

    Examples:
        >>> await nq.pause("no-such-queue")
        Traceback (most recent call last):
            ...
        nqnb.errors.UnknownQueue: queue 'no-such-queue' does not exist: a queue is created when its first task is
        submitted. Run `nqnb queue list` to see the existing queues.
    """

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


class QueueInUse(NqnbError):
    """A queue was not deleted because it still has tasks or workers.

    ``.queue`` is the name of the queue. ``.pending``, ``.processing`` and ``.workers`` are the numbers of waiting
    tasks, running tasks and live workers.

    Examples:
        >>> try:
        ...     await nq.delete_queue("resize")
        ... except nqnb.QueueInUse as error:
        ...     print(error.queue, error.workers)
        resize 1
    """

    def __init__(self, message: str, queue: str, pending: int = 0, processing: int = 0, workers: int = 0) -> None:
        super().__init__(message)
        self.queue = queue
        self.pending = pending
        self.processing = processing
        self.workers = workers


class UnknownSchedule(NqnbError):
    """The server has no schedule with this name; ``.name`` is the name.

    Examples:
        >>> await nq.run_schedule("no-such-schedule")
        Traceback (most recent call last):
            ...
        nqnb.errors.UnknownSchedule: schedule 'no-such-schedule' is unknown: the server has no schedule with this name.
        Run `nqnb schedule list` to see the existing schedules.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class ScheduleExists(NqnbError):
    """A schedule of this name exists, with a different definition; ``.name`` is the name.

    Examples:
        >>> await nq.every(minutes=5, queue="resize", payload={"path": "a.png"}, name="poll")
        <ScheduleInfo poll: every 5 minutes, queue resize, next ...>
        >>> await nq.every(minutes=9, queue="resize", payload={"path": "a.png"}, name="poll")
        Traceback (most recent call last):
            ...
        nqnb.errors.ScheduleExists: schedule 'poll' cannot be created: it already exists with another definition (every
        5 minutes, queue 'resize'). Choose another name, or replace the schedule (replace=True, or --replace).
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class TaskError(NqnbError):
    """An error that concerns one task; ``.task_id`` is the task's id, and ``.status`` is its state, if known.

    Examples:
        >>> try:
        ...     await nq.result("no-such-task")
        ... except nqnb.TaskError as error:
        ...     print(type(error).__name__, error.task_id)
        UnknownTask no-such-task
    """

    def __init__(self, message: str, task_id: str, status: Status | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.status = status


class UnknownTask(TaskError):
    """The state bucket has no task with this id.

    Examples:
        >>> await nq.fetch("no-such-task")
        Traceback (most recent call last):
            ...
        nqnb.errors.UnknownTask: task 'no-such-task' is unknown: this server has no task with that id. Check the id and
        the server, or run `nqnb task list` to see the existing tasks.
    """


class TaskExists(TaskError):
    """Another task already has the id or the key that the caller chose.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, id="taken")
        >>> await nq.submit("resize", {"path": "b.png"}, id="taken")
        Traceback (most recent call last):
            ...
        nqnb.errors.TaskExists: task id 'taken' is taken: another task has this id. Choose another id, or omit it to get
        a random id.
    """


class NotCancellable(TaskError):
    """The task completed or failed before it could be cancelled; ``.status`` is its state.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"})
        >>> await task.wait()
        <Status.COMPLETED: 3>
        >>> try:
        ...     await task.cancel()
        ... except nqnb.NotCancellable as error:
        ...     print(error.status)
        completed
    """


class NotRequeueable(TaskError):
    """The task cannot be requeued: it has not ended, or its payload is no longer stored; ``.status`` is its state.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, process_at=timedelta(hours=1))
        >>> try:
        ...     await task.requeue()
        ... except nqnb.NotRequeueable as error:
        ...     print(error.status)
        pending
    """


class TaskFailed(TaskError):
    """The task failed; ``.error_type`` and ``.traceback`` are strings that describe the handler's exception.

    Notebooks, and Python 3.11 and later, print the handler's traceback as a note below the message.

    Examples:
        >>> task = await nq.submit("resize", {"path": "notes.txt"})
        >>> try:
        ...     await task
        ... except nqnb.TaskFailed as error:
        ...     print(error.error_type, error.traceback.splitlines()[-1])
        ValueError ValueError: cannot open 'notes.txt'
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
    """The task was cancelled (or deleted before it started), so it has no result.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, process_at=timedelta(hours=1))
        >>> await task.cancel()
        <CancelReceipt ...: deleted before it started>
        >>> await task
        Traceback (most recent call last):
            ...
        nqnb.errors.TaskCancelled: task '...' has no result: it was cancelled by ... before it started (NQ calls this
        deleted). Requeue the task to run it again.
    """


class WaitTimeout(TaskError, TimeoutError):
    """The task did not end within the timeout. The task itself is not affected.

    Examples:
        >>> task = await nq.submit("resize", {"path": "a.png"}, id="tomorrow", process_at=timedelta(days=1))
        >>> await task.result(timeout=0.1)
        Traceback (most recent call last):
            ...
        nqnb.errors.WaitTimeout: task 'tomorrow' did not finish within 0.1 s: the task is still pending, due at ....
        Wait longer, or cancel the task.
    """


class NotSubmitted(NqnbError):
    """Some tasks of a ``submit_many`` call could not be submitted.

    ``.tasks`` has an item for each payload, in the same order: a `Task`, or None for a failed payload. ``.errors`` maps
    the index of each failed payload to the error.

    Examples:
        >>> try:
        ...     await nq.submit_many("resize", [{"path": "a.png"}, bytes(2_000_000)])
        ... except nqnb.NotSubmitted as error:
        ...     print(error.tasks)
        ...     print(error.errors[1])
        [<Task ... in resize>, None]
        the payload of 2,000,000 bytes is too large: ...
    """

    def __init__(self, message: str, tasks: Sequence[Any], errors: Mapping[int, NqnbError]) -> None:
        super().__init__(message)
        self.tasks = tasks
        self.errors = errors


class DevServerError(NqnbError):
    """The bundled nats-server cannot be found, did not start, or stopped unexpectedly.

    Examples:
        >>> try:
        ...     nqnb.DevServer(config="no_such_option: 1").start()
        ... except nqnb.DevServerError as error:
        ...     print(error)
        nats-server with store '...' failed: it exited with code 1. The end of the server's log:
        nats-server: ... unknown field "no_such_option"
    """


class MetricsUnavailable(NqnbError):
    """The metrics cannot be served: prometheus-client is not installed, or the address cannot be used.

    Examples:
        >>> worker = nqnb.Worker(metrics="192.0.2.1:9464")  # not an address of this machine
        >>> @worker.handler("thumbnail")
        ... def thumbnail(payload: dict) -> None: ...
        >>> await worker.start()
        Traceback (most recent call last):
            ...
        nqnb.errors.MetricsUnavailable: metrics cannot be served on 192.0.2.1:9464: ... Choose another port or host.
    """


class HealthUnavailable(NqnbError):
    """The health checks cannot be served, because the address cannot be used.

    Examples:
        >>> worker = nqnb.Worker(health="192.0.2.1:8080")  # not an address of this machine
        >>> @worker.handler("thumbnail")
        ... def thumbnail(payload: dict) -> None: ...
        >>> await worker.start()
        Traceback (most recent call last):
            ...
        nqnb.errors.HealthUnavailable: health checks cannot be served on 192.0.2.1:8080: ... Choose another port or
        host.
    """


class TracingUnavailable(NqnbError):
    """Tasks cannot be traced: opentelemetry-api is not installed.

    Examples:
        >>> from nqnb import tracing
        >>> try:
        ...     tracing.instrument()
        ... except nqnb.TracingUnavailable as error:
        ...     print(error)
        ... finally:
        ...     tracing.uninstrument()
    """


class JobCancelled(BaseException):
    """The exception that nqnb raises inside a handler to stop the handler. Handlers must not suppress it.

    Examples:
        >>> from nqnb.testing import job
        >>> try:
        ...     job(cancelled=True).progress(1, 2)
        ... except nqnb.JobCancelled:
        ...     print("clean up, then raise it again")
        clean up, then raise it again
    """
