"""Spans for submits, waits, runs and cancels. Only this module imports opentelemetry.

The names and attributes follow OpenTelemetry's semantic conventions for messaging. The submit span is the parent of
the spans of all attempts, because the headers of the task's message contain the context of the submit span.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, StatusCode, TracerProvider

from nqnb.protocol.status import Status
from nqnb.protocol.wire import Meta
from nqnb.version import __version__

log = logging.getLogger("nqnb.tracing")

_LONGEST_HEADER = 8192
"""The maximum length of a header's value. This is the limit for W3C baggage, the longest of the usual headers."""
_HEADER_NAME = re.compile(r"[!-9;-~]+")
_TASK = contexts.create_key("nqnb-task")
_submitting: ContextVar[bool] = ContextVar("nqnb-submitting", default=False)
"""Whether the current span is the span of a submit."""
_OUTCOMES = {
    Status.COMPLETED: "completed",
    Status.FAILED: "failed",
    Status.CANCELLED: "cancelled",
    Status.PENDING: "retried",
    None: "dropped",
}
"""The outcome of a run, by the state that the worker has written."""


Address = tuple[str, int]


class Spans:
    """An object that creates spans. In all methods, ``server`` is the host and the port of the NATS server.

    Args:
        provider: the provider of the spans, or None for OpenTelemetry's global provider.
    """

    def __init__(self, provider: TracerProvider | None) -> None:
        self._tracer = trace.get_tracer("nqnb", __version__, provider)

    @contextlib.contextmanager
    def submit(self, server: Address, queue: str = "", origin: str = "") -> Iterator[TaskSpan]:
        """Create the span of a submit. In the ``with`` block, `submit_headers` returns the span's context.

        For a requeue, ``origin`` is the id of the original task. Otherwise, it is empty.
        """
        operation = "requeue" if origin else "submit"
        with self._span(operation, SpanKind.PRODUCER, server, queue, kind="send", origin=origin) as span:
            token = _submitting.set(True)
            try:
                yield span
            finally:
                _submitting.reset(token)

    def wait(self, server: Address, task_id: str) -> contextlib.AbstractContextManager[TaskSpan]:
        """Create the span of a wait for the end of a task."""
        return self._span("wait", SpanKind.CLIENT, server, task_id=task_id)

    def cancel(self, server: Address, task_id: str, queue: str) -> contextlib.AbstractContextManager[TaskSpan]:
        """Create the span of a cancel. ``queue`` is the queue of the task, or an empty string if it is unknown."""
        return self._span("cancel", SpanKind.CLIENT, server, queue, task_id)

    def run(
        self,
        server: Address,
        headers: Mapping[str, str],
        *,
        queue: str,
        task_id: str,
        attempt: int,
        deliveries: int,
        worker: str,
    ) -> RunSpan:
        """Start the span of one attempt, and make it the current span of this asyncio task.

        Args:
            server: the host and the port of the server.
            headers: the headers of the task's message, which come from another program.
            queue: the queue.
            task_id: the task's id.
            attempt: the number of the attempt, starting at 1.
            deliveries: how many times the server has delivered the message.
            worker: the worker's id.
        """
        # Without a context in the headers, the span starts a new trace. The current span is not the parent, because it
        # is the span in which the worker was started.
        context = extract(headers)
        submitted = trace.get_current_span(context).get_span_context()
        span = self._tracer.start_span(
            f"run {queue}",
            context,
            SpanKind.CONSUMER,
            {
                **_attributes("run", server, queue, task_id, kind="process"),
                "messaging.client.id": worker,
                "nqnb.task.attempt": attempt,
                "nqnb.task.deliveries": deliveries,
            },
            [Link(submitted)] if submitted.is_valid else None,
        )
        contexts.attach(trace.set_span_in_context(span, context))
        return RunSpan(span)

    def within(self, submitted: SpanContext) -> Attached:
        """Return a context manager that adds spans to a task's trace; see `nqnb.tracing.within`."""
        return Attached(contexts.set_value(_TASK, submitted))

    def headers(self) -> dict[str, str]:
        """Return the current trace context as headers."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return {name: value for name, value in carrier.items() if _is_header(name, value)}

    def submit_headers(self) -> dict[str, str]:
        """Return headers with the trace context for a task's message, or an empty dict outside a `submit` block.

        A worker submits recurring tasks outside such a block. The current span is then the span in which the worker was
        started, which must not become the parent of the tasks.
        """
        return self.headers() if _submitting.get() else {}

    @contextlib.contextmanager
    def _span(
        self,
        operation: str,
        role: SpanKind,
        server: Address,
        queue: str = "",
        task_id: str = "",
        *,
        kind: str = "",
        origin: str = "",
    ) -> Iterator[TaskSpan]:
        context, links = _place()
        attributes = _attributes(operation, server, queue, task_id, kind=kind, origin=origin)
        name = f"{operation} {queue}".rstrip()
        with self._tracer.start_as_current_span(name, context, role, attributes, links) as span:
            try:
                yield TaskSpan(span, operation)
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                raise


class TaskSpan:
    """The span of a client's operation on one task.

    Args:
        span: the span.
        operation: the name of the operation.
    """

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation

    @property
    def context(self) -> SpanContext:
        """The context of the span, for `nqnb.tracing.within`."""
        return self._span.get_span_context()

    def set(self, task_id: str = "", *, queue: str = "", status: Status | None = None, attached: bool = False) -> None:
        """Add attributes of the task to the span. Arguments with default values are left out."""
        if queue:
            self._span.update_name(f"{self._operation} {queue}")
        facts: dict[str, str | bool] = {
            "messaging.message.id": task_id,
            "messaging.destination.name": queue,
            "nqnb.task.status": "" if status is None else status.label,
            "nqnb.task.attached": attached,
        }
        self._span.set_attributes({name: value for name, value in facts.items() if value})


class RunSpan:
    """The span of one attempt at a task, from the claim until the outcome is stored."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._status: Status | None = None

    def record(self, status: Status | None, meta: Meta, retry_delay: float) -> None:
        """Record how the attempt ended.

        Args:
            status: the state that was written, or None if another worker owns the task or the task will be redelivered.
            meta: the metadata that was written.
            retry_delay: the number of seconds until the next attempt. It is used only if the task will be retried.
        """
        span, error, cancel = self._span, meta.error, meta.cancel
        self._status = status
        if error is not None:
            span.set_attribute("error.type", error.type)
            span.set_status(StatusCode.ERROR, ": ".join(part for part in (error.type, error.message) if part))
            parts = {"type": error.type, "message": error.message, "stacktrace": error.traceback}
            span.add_event("exception", {f"exception.{part}": text for part, text in parts.items()})
        if status is Status.PENDING:
            span.add_event("retry", {"nqnb.retry.delay_seconds": retry_delay})
        if status is Status.CANCELLED and cancel is not None:
            span.add_event("cancel", {"nqnb.cancel.by": cancel.by, "nqnb.cancel.how": cancel.how})

    def end(self) -> None:
        """End the span."""
        self._span.set_attribute("nqnb.task.outcome", _OUTCOMES.get(self._status, "dropped"))
        self._span.end()


class Attached:
    """A context manager that sets the current context. Unlike a generator, it adds no frame to tracebacks of errors."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._token = contexts.attach(self._context)

    def __exit__(self, *exc_info: object) -> None:
        contexts.detach(self._token)


def extract(headers: Mapping[str, str]) -> Context:
    """Return the trace context in the given headers. If the headers are malformed, return an empty context."""
    try:
        # Some Go programs write `Traceparent`.
        return propagate.extract({name.lower(): value for name, value in headers.items()}, Context())
    except Exception as error:  # noqa: BLE001  a propagator may raise anything, and the headers may contain anything
        log.debug("the trace context of a task is ignored, because it cannot be read: %r", error)
        return Context()


def _place() -> tuple[Context, list[Link]]:
    """Return the parent context and the links of a new span; see `nqnb.tracing.within`."""
    context = contexts.get_current()
    task = context.get(_TASK)
    if not isinstance(task, SpanContext):
        return context, []
    here = trace.get_current_span(context).get_span_context()
    if not here.is_valid:
        return trace.set_span_in_context(NonRecordingSpan(task), context), []
    return context, [] if here.trace_id == task.trace_id else [Link(task)]


def _attributes(
    operation: str, server: Address, queue: str, task_id: str, *, kind: str, origin: str = ""
) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.destination.name": queue,
        "messaging.message.id": task_id,
        "server.address": server[0],
        "server.port": server[1],
        "nqnb.task.origin": origin,
    }
    return {name: value for name, value in attributes.items() if value}


def _is_header(name: str, value: str) -> bool:
    return bool(_HEADER_NAME.fullmatch(name)) and value.isprintable() and len(value) <= _LONGEST_HEADER
