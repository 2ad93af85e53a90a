"""NQ task queues on NATS JetStream: submit, run, watch, and cancel for certain.

::

    async with nqnb.connect("nats://127.0.0.1:4222") as nq:
        task = await nq.submit("resize", {"path": "a.png"})
        result = await task

    worker = nqnb.Worker("nats://127.0.0.1:4222")

    @worker.handler("resize")
    def resize(job: nqnb.Job, payload: dict) -> str: ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nqnb.version import __version__

if TYPE_CHECKING:
    from nqnb.client import Client, connect
    from nqnb.errors import (
        BadInput,
        ConnectionFailed,
        DevServerError,
        InvalidHandler,
        InvalidQueueName,
        InvalidTaskId,
        JobCancelled,
        MalformedMessage,
        NoJetStream,
        NoResponders,
        NoRoom,
        NoServer,
        NotCancellable,
        NotRequeueable,
        NotSubmitted,
        NqnbError,
        PayloadTooLarge,
        QueueInUse,
        RevisionConflict,
        ServerRefused,
        TaskCancelled,
        TaskError,
        TaskExists,
        TaskFailed,
        Unavailable,
        Unconfirmed,
        UnencodableValue,
        UnknownQueue,
        UnknownTask,
        WaitTimeout,
    )
    from nqnb.notebook.extension import load_ipython_extension, unload_ipython_extension
    from nqnb.notebook.nest import nest
    from nqnb.notebook.sessions import session
    from nqnb.protocol.wire import CancelMessage, CancelRecord, ErrorInfo, Progress, Status, TaskMessage
    from nqnb.records import CancelReceipt, PruneReceipt, PurgeReceipt, QueueInfo, TaskInfo, WorkerInfo
    from nqnb.retry import Backoff
    from nqnb.server.devserver import DevServer
    from nqnb.settings import Settings
    from nqnb.store import Entry, MemoryStore, StateStore
    from nqnb.task import Task
    from nqnb.worker.job import Job
    from nqnb.worker.worker import Worker

__all__ = [
    "Backoff",
    "BadInput",
    "CancelMessage",
    "CancelReceipt",
    "CancelRecord",
    "Client",
    "ConnectionFailed",
    "DevServer",
    "DevServerError",
    "Entry",
    "ErrorInfo",
    "InvalidHandler",
    "InvalidQueueName",
    "InvalidTaskId",
    "Job",
    "JobCancelled",
    "MalformedMessage",
    "MemoryStore",
    "NoJetStream",
    "NoResponders",
    "NoRoom",
    "NoServer",
    "NotCancellable",
    "NotRequeueable",
    "NotSubmitted",
    "NqnbError",
    "PayloadTooLarge",
    "Progress",
    "PruneReceipt",
    "PurgeReceipt",
    "QueueInUse",
    "QueueInfo",
    "RevisionConflict",
    "ServerRefused",
    "Settings",
    "StateStore",
    "Status",
    "Task",
    "TaskCancelled",
    "TaskError",
    "TaskExists",
    "TaskFailed",
    "TaskInfo",
    "TaskMessage",
    "Unavailable",
    "Unconfirmed",
    "UnencodableValue",
    "UnknownQueue",
    "UnknownTask",
    "WaitTimeout",
    "Worker",
    "WorkerInfo",
    "__version__",
    "connect",
    "load_ipython_extension",
    "nest",
    "session",
    "unload_ipython_extension",
]

_ROOMS = {
    "client": "Client connect",
    "server.devserver": "DevServer",
    "errors": (
        "BadInput ConnectionFailed DevServerError InvalidHandler InvalidQueueName InvalidTaskId JobCancelled "
        "MalformedMessage NoJetStream NoResponders NoRoom NoServer NotCancellable NotRequeueable NotSubmitted "
        "NqnbError PayloadTooLarge QueueInUse RevisionConflict ServerRefused TaskCancelled TaskError TaskExists "
        "TaskFailed Unavailable Unconfirmed UnencodableValue UnknownQueue UnknownTask WaitTimeout "
    ),
    "notebook.extension": "load_ipython_extension unload_ipython_extension",
    "notebook.nest": "nest",
    "notebook.sessions": "session",
    "records": "CancelReceipt PruneReceipt PurgeReceipt QueueInfo TaskInfo WorkerInfo",
    "retry": "Backoff",
    "settings": "Settings",
    "store": "Entry MemoryStore StateStore",
    "task": "Task",
    "protocol.wire": "CancelMessage CancelRecord ErrorInfo Progress Status TaskMessage",
    "worker.job": "Job",
    "worker.worker": "Worker",
}
"""Where each public name lives. They load when first touched, so that ``import nqnb`` costs a notebook nothing."""


def __getattr__(name: str) -> Any:
    for room, residents in _ROOMS.items():
        if name in residents.split():
            value = getattr(import_module(f"nqnb.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'nqnb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
