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

from nqnb.client import Client, connect
from nqnb.devserver import DevServer
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
    NoServer,
    NotCancellable,
    NotSubmitted,
    NqnbError,
    PayloadTooLarge,
    RevisionConflict,
    ServerRefused,
    TaskCancelled,
    TaskError,
    TaskExists,
    TaskFailed,
    Unconfirmed,
    UnencodableValue,
    UnknownTask,
    WaitTimeout,
)
from nqnb.records import CancelReceipt, QueueInfo, TaskInfo, WorkerInfo
from nqnb.retry import Backoff
from nqnb.settings import Settings
from nqnb.store import Entry, MemoryStore, StateStore
from nqnb.task import Task
from nqnb.version import __version__
from nqnb.wire import CancelMessage, CancelRecord, ErrorInfo, Progress, Status, TaskMessage
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
    "NoServer",
    "NotCancellable",
    "NotSubmitted",
    "NqnbError",
    "PayloadTooLarge",
    "Progress",
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
    "Unconfirmed",
    "UnencodableValue",
    "UnknownTask",
    "WaitTimeout",
    "Worker",
    "WorkerInfo",
    "__version__",
    "connect",
]
