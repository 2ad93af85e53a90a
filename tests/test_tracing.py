"""Traces: one trace for each task, over retries, schedules and processes; and none unless it is switched on."""

from __future__ import annotations

import asyncio
import base64
import re
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Start, start, url
from helpers.waiting import until, until_async
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from test_docs import blocks

import nqnb
from nqnb import tracing
from nqnb.protocol import lifecycle
from nqnb.protocol.wire import TaskMessage

pytestmark = pytest.mark.anyio
__all__ = ["start", "url"]

RETRIED = """

@worker.handler("retried", isolation="process", backoff=nqnb.Backoff(0.05, 0.05))
def retried(job, payload):
    with trace.get_tracer("jobs").start_as_current_span("step"):
        if job.attempt == 1:
            raise ValueError("the first attempt fails")
        job.progress(1)
        job.wait(60)
"""


@pytest.fixture
def settings(url: str) -> nqnb.Settings:
    """Return settings for the server that all tests of this module share. Each test has queues of its own."""
    return nqnb.Settings(url, ack_wait=1.0, retry_for=5.0)


class Collector:
    """What an OpenTelemetry collector does: it receives spans over OTLP."""

    def __init__(self) -> None:
        spans: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    spans.extend(span for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.spans = spans
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def named(self, name: str) -> list[Any]:
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_time_unix_nano)


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    serving = threading.Thread(target=collector.server.serve_forever, daemon=True)
    serving.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    serving.join()


class Memory:
    """The spans of this process."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        found = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)

    def only(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    tracing.instrument(memory.provider)
    yield memory
    tracing.uninstrument()


def trace_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def attributes_of(span: Any) -> dict[str, Any]:
    """Return the attributes of a span from a collector."""
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


async def test_one_trace_from_the_submit_to_the_cancel_through_a_process(
    url: str, nq: nqnb.Client, collector: Collector, start: Start, tmp_path: Path
) -> None:
    (program,) = (code for page, code in blocks("python") if page == "docs/operating.md")
    (tmp_path / "jobs.py").write_text(program + RETRIED)
    endpoint = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.url}
    worker = start("worker", "jobs:worker", "-u", url, cwd=tmp_path, **endpoint)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=collector.url)))
    tracing.instrument(provider)
    try:
        with provider.get_tracer("shop").start_as_current_span("order"):
            task = await nq.submit("retried", {"path": "a.png"}, retry=1)
            waiting = asyncio.ensure_future(task.wait(30))

            async def second_attempt_runs() -> bool:
                info = await task.fetch()
                return info.attempt == 2 and info.progress is not None

            await until_async(second_attempt_runs, what="the second attempt runs", pause=0.05)
            receipt = await task.cancel(wait=30)
            assert receipt.status is await waiting is nqnb.Status.CANCELLED
    finally:
        tracing.uninstrument()
    worker.terminate()
    assert worker.wait(60) == 0
    until(lambda: len(collector.spans) == 8, what="all spans have arrived")
    assert len({span.trace_id for span in collector.spans}) == 1
    (order,), (submit,), (wait,), (cancel,) = map(
        collector.named, ("order", "submit retried", "wait retried", "cancel retried")
    )
    runs, steps = collector.named("run retried"), collector.named("step")
    assert [span.parent_span_id for span in (submit, wait, cancel)] == [order.span_id] * 3
    assert [span.parent_span_id for span in runs] == [submit.span_id] * 2
    assert [span.parent_span_id for span in steps] == [run.span_id for run in runs]
    assert [attributes_of(run)["nqnb.task.attempt"] for run in runs] == [1, 2]
    assert [attributes_of(run)["nqnb.task.outcome"] for run in runs] == ["retried", "cancelled"]
    assert {attributes_of(span)["messaging.message.id"] for span in (submit, wait, cancel, *runs)} == {task.id}
    assert [[event.name for event in run.events] for run in runs] == [["exception", "retry"], ["cancel"]]


async def test_spans_follow_the_conventions_for_messaging(
    url: str, nq: nqnb.Client, settings: nqnb.Settings, memory: Memory
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("sizes")
    def fail(job: nqnb.Job, payload: int) -> None:
        with memory.tracer.start_as_current_span("in a thread"):
            raise ValueError(f"not {payload}")

    with memory.tracer.start_as_current_span("the span that starts the worker"):
        await worker.start()
    try:
        task = await nq.submit("sizes", 3)
        assert await task.wait(30) is nqnb.Status.FAILED
    finally:
        await worker.stop()
    submit, run, wait = memory.only("submit sizes"), memory.only("run sizes"), memory.only("wait sizes")
    common = {
        "messaging.system": "nats",
        "messaging.destination.name": "sizes",
        "messaging.message.id": task.id,
        "server.address": "127.0.0.1",
        "server.port": int(url.rpartition(":")[2]),
    }
    assert dict(submit.attributes or {}) == {
        **common,
        "messaging.operation.name": "submit",
        "messaging.operation.type": "send",
    }
    assert dict(run.attributes or {}) == {
        **common,
        "messaging.operation.name": "run",
        "messaging.operation.type": "process",
        "messaging.client.id": worker.id,
        "nqnb.task.attempt": 1,
        "nqnb.task.deliveries": 1,
        "nqnb.task.outcome": "failed",
        "error.type": "ValueError",
    }
    assert [span.kind for span in (submit, run, wait)] == [SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.CLIENT]
    assert (run.status.status_code, run.status.description) == (StatusCode.ERROR, "ValueError: not 3")
    (error,) = run.events
    assert (error.attributes or {})["exception.message"] == "not 3"
    assert "in fail" in str((error.attributes or {})["exception.stacktrace"])
    assert parent_of(run) == id_of(submit)
    assert [link.context.span_id for link in run.links] == [id_of(submit)]
    assert parent_of(memory.only("in a thread")) == id_of(run)
    # The caller has no span. The wait belongs to the trace of its task.
    assert trace_of(submit) == trace_of(run) == trace_of(wait)
    assert wait.status.status_code is StatusCode.UNSET, "the wait itself succeeded"


async def test_the_status_of_an_error_without_a_message_is_its_type(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("silent")
    def fail(job: nqnb.Job) -> None:
        raise ValueError

    async with worker:
        assert await (await nq.submit("silent")).wait(30) is nqnb.Status.FAILED
    assert memory.only("run silent").status.description == "ValueError"


async def test_the_context_survives_schedules_even_if_a_worker_does_not_trace(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LONG_WAIT_SECONDS", 0.3)
    worker = nqnb.Worker(settings)

    @worker.handler("later", backoff=nqnb.Backoff(2.0, 2.0))
    async def later(job: nqnb.Job) -> None:
        # The outcome of the first attempt, and the schedule of its retry, are written without tracing.
        if job.id != "moved" and job.attempt == 1:
            tracing.uninstrument()
            raise ValueError

    # A message that the worker receives too early, and moves into a schedule.
    start = datetime.now(timezone.utc) + timedelta(seconds=3)
    await _publish(nq, TaskMessage(ID="moved", Queue="later", ProcessAt=start.isoformat()), {"traceparent": SUBMIT})
    async with worker:
        task = await nq.submit("later", retry=1, process_at=timedelta(seconds=0.5))
        await until_async(lambda: _is_attempt(task, 2), what="the task waits for its retry", pause=0.05)
        tracing.instrument(memory.provider)
        await task.result(30)
        await nq.task("moved").result(30)
    runs = memory.named("run later")
    (moved,) = (run for run in runs if (run.attributes or {})["messaging.message.id"] == "moved")
    first, second = (run for run in runs if run is not moved)
    assert f"{trace_of(moved):032x}" in SUBMIT
    assert parent_of(first) == parent_of(second) == id_of(memory.only("submit later"))
    assert (second.attributes or {})["nqnb.task.attempt"] == 2


async def _is_attempt(task: nqnb.Task, attempt: int) -> bool:
    return (await task.fetch()).attempt == attempt


async def _publish(nq: nqnb.Client, message: TaskMessage, headers: dict[str, str]) -> None:
    """Publish a message and create its entry, as a Go client does."""
    await nq.backend.ensure_queue(message.Queue)
    ack = await nq.backend.connection.publish(f"{message.Queue}.task", message.encode(), headers)
    message.Sequence = ack.sequence
    await nq.backend.states.create(message.ID, message.encode())


SUBMIT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("traced", [True, False], ids=["on", "off"])
async def test_the_headers_of_other_programs(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory, traced: bool
) -> None:
    given: dict[str, dict[str, str]] = {
        "none": {},
        "lower": {"traceparent": SUBMIT},
        "upper": {"Traceparent": SUBMIT, "Tracestate": "congo=t61rcWkgMzE"},
        "zeros": {"traceparent": f"00-{0:032}-{0:016}-01"},
        "malformed": {"traceparent": "\x1b[31m\x00", "tracestate": "=" * 5000, "baggage": "%%%;;=,"},
    }
    if not traced:
        tracing.uninstrument()
    queue = f"go-{traced}"
    for name, headers in given.items():
        await _publish(nq, TaskMessage(ID=f"{name}-{traced}", Queue=queue), headers)
    worker = nqnb.Worker(settings)
    worker.handler(queue)(lambda payload: "done")
    async with worker:
        for name in given:
            assert await nq.task(f"{name}-{traced}").result(30) == "done"
    runs = {str((run.attributes or {})["messaging.message.id"]): run for run in memory.named(f"run {queue}")}
    assert len(runs) == (len(given) if traced else 0)
    continued = {name for name, run in runs.items() if f"{trace_of(run):032x}" in SUBMIT}
    assert continued == {name for name, run in runs.items() if run.parent is not None}
    if traced:
        assert continued == {"lower-True", "upper-True"}
        parent = runs["upper-True"].parent
        assert parent is not None
        assert parent.trace_state["congo"] == "t61rcWkgMzE"


async def test_a_broken_propagator_does_not_stop_tasks(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("broken")

    def hostile(carrier: dict[str, str], *args: Any, **kwargs: Any) -> None:
        carrier.update({"a": "1\r\nNats-Msg-Id: other", "b c": "2", "long": "x" * 100_000, "fine": "3"})

    monkeypatch.setattr(propagate, "extract", broken)
    monkeypatch.setattr(propagate, "inject", hostile)
    worker = nqnb.Worker(settings)
    worker.handler("broken")(lambda payload: "done")
    async with worker:
        task = await nq.submit("broken")
        assert await task.result(30) == "done"
    assert tracing.active is not None
    assert tracing.active.headers() == {"fine": "3"}


async def test_errors_and_attached_and_requeued_tasks(nq: nqnb.Client, memory: Memory) -> None:
    task = await nq.submit("q", key="once")
    again = await nq.submit("q", key="once")
    with pytest.raises(nqnb.WaitTimeout):
        await again.wait(0)
    with memory.tracer.start_as_current_span("another trace"):
        await task.cancel()
    copy = await task.requeue()
    with pytest.raises(nqnb.TaskExists):
        await nq.submit("q", id=copy.id)
    submit, attached, refused = memory.named("submit q")
    assert "nqnb.task.attached" not in (submit.attributes or {})
    assert (attached.attributes or {})["nqnb.task.attached"] is True
    assert (refused.attributes or {})["error.type"] == "TaskExists"
    assert refused.status.status_code is StatusCode.ERROR
    (wait,) = memory.named("wait")
    assert (wait.attributes or {})["error.type"] == "WaitTimeout"
    cancel, other = memory.only("cancel q"), memory.only("another trace")
    assert parent_of(cancel) == id_of(other)
    assert [link.context.span_id for link in cancel.links] == [id_of(submit)]
    assert (cancel.attributes or {})["nqnb.task.status"] == "deleted"
    requeue = memory.only("requeue q")
    assert requeue.kind is SpanKind.PRODUCER
    assert (requeue.attributes or {})["nqnb.task.origin"] == task.id
    assert (requeue.attributes or {})["messaging.message.id"] == copy.id


async def test_waits_and_cancels_of_typed_tasks_belong_to_the_trace_of_the_submit(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory
) -> None:
    worker = nqnb.Worker(settings)

    @worker.task("half")
    def half(payload: int) -> float:
        return payload / 2

    async with worker:
        task = await half.submit(nq, 3)
        assert await task == 1.5
        later = await half.submit(nq, 3, process_at=timedelta(hours=1))
        await later.cancel()
    first, second = memory.named("submit half")
    assert parent_of(memory.only("wait half")) == id_of(first)
    assert parent_of(memory.only("cancel half")) == id_of(second)


def test_waits_and_cancels_in_a_session_belong_to_the_trace_of_the_submit(url: str, memory: Memory) -> None:
    session = nqnb.session(url, ack_wait=1.0, retry_for=5.0)
    try:
        task = session.submit("cells", 1)
        with pytest.raises(nqnb.WaitTimeout):
            task.result(0)
        with pytest.raises(nqnb.WaitTimeout):
            task.wait(0)
        task.cancel()
        again = task.requeue()
        again.cancel()
        tasks = session.map("mapped", [1, 2])
        with pytest.raises(nqnb.WaitTimeout):
            tasks.results(0)
        with memory.tracer.start_as_current_span("a cell"), pytest.raises(nqnb.WaitTimeout):
            tasks.wait(0)
        tasks.cancel()
        latest = session.map("latest", [1, 2]).latest()
        with pytest.raises(nqnb.WaitTimeout):
            latest[0].wait(0)
        session.cancel(latest[0])
        session.cancel(latest[1:])
    finally:
        session.down()
    submit, requeue = memory.only("submit cells"), memory.only("requeue cells")
    waits = memory.named("wait")
    assert [parent_of(wait) for wait in waits[:2]] == [id_of(submit)] * 2
    assert [parent_of(cancel) for cancel in memory.named("cancel cells")] == [id_of(submit), id_of(requeue)]
    mapped = {id_of(each) for each in memory.named("submit mapped")}
    assert {parent_of(wait) for wait in waits[2:4]} == mapped
    assert {parent_of(wait) for wait in waits[4:6]} == {id_of(memory.only("a cell"))}
    assert {link.context.span_id for wait in waits[4:6] for link in wait.links} == mapped
    submits = [*memory.named("submit mapped"), *memory.named("submit latest")]
    submit_of = {(each.attributes or {})["messaging.message.id"]: id_of(each) for each in submits}
    assert parent_of(waits[6]) == submit_of[latest.ids[0]]
    cancels = {(each.attributes or {})["messaging.message.id"]: parent_of(each) for each in memory.named("cancel")}
    assert cancels == submit_of


async def test_a_session_task_that_is_awaited_belongs_to_the_trace_of_the_submit(url: str, memory: Memory) -> None:
    session = await asyncio.to_thread(nqnb.session, url, ack_wait=1.0, retry_for=5.0)
    try:
        task = await asyncio.to_thread(session.submit, "awaited")
        await asyncio.to_thread(task.cancel)
        with pytest.raises(nqnb.TaskCancelled):
            await task
    finally:
        await asyncio.to_thread(session.down)
    (wait,) = (span for span in memory.exporter.get_finished_spans() if span.name.startswith("wait"))
    assert parent_of(wait) == id_of(memory.only("submit awaited"))


async def test_only_a_submit_sends_its_context(nq: nqnb.Client, memory: Memory) -> None:
    await nq.backend.ensure_queue("quiet")
    # The loops of a worker, which submit the tasks of schedules, inherit the span in which the worker was started.
    with memory.tracer.start_as_current_span("the span that starts the worker"):
        await nq.backend.publish_task("quiet", "1", b"{}")
        await nq.every(minutes=5, queue="quiet", name="quiet")
        task = await nq.run_schedule("quiet")
    headers = [
        base64.b64decode((await nq.backend.connection.api("STREAM.MSG.GET.quiet", {"seq": each}))["message"]["hdrs"])
        for each in (1, 2)
    ]
    assert [b"traceparent" in each for each in headers] == [False, True]
    submit = memory.only("submit quiet")
    assert (submit.attributes or {})["messaging.message.id"] == task.id
    assert f"{id_of(submit):016x}".encode() in headers[1]
    await nq.remove_schedule("quiet")


async def test_a_reused_process_has_the_context_of_its_own_task(
    nq: nqnb.Client, settings: nqnb.Settings, memory: Memory
) -> None:
    worker = nqnb.Worker(settings, concurrency=1)

    def current(job: Any) -> str:
        return f"{trace.get_current_span().get_span_context().span_id:x}"

    worker.handler("reused", isolation="process", reuse=3)(current)
    async with worker:
        traced = [await nq.submit("reused") for _ in range(2)]
        seen = [await task.result(20) for task in traced]
        tracing.uninstrument()
        seen.append(await (await nq.submit("reused")).result(20))
    assert seen == [*(f"{id_of(run):x}" for run in memory.named("run reused")), "0"]


async def test_no_context_is_sent_by_default(nq: nqnb.Client) -> None:
    task = await nq.submit("untraced")
    stored = await nq.backend.connection.api("STREAM.MSG.GET.untraced", {"seq": 1})
    assert b"trace" not in base64.b64decode(stored["message"]["hdrs"]).lower()
    await task.cancel()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nqnb.tracing.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(nqnb.TracingUnavailable, match=r"opentelemetry-api cannot be imported.*'nqnb\[otel\]'"):
        tracing.instrument()


def test_opentelemetry_instrument_switches_tracing_on() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (entry,) = re.findall(r'opentelemetry_instrumentor]\nnqnb = "(.*)"', project)
    module, _, name = entry.partition(":")
    instrumentor = getattr(import_module(module), name)()
    instrumentor.instrument(skip_dep_check=True)
    assert tracing.active is not None
    instrumentor.uninstrument()
    assert tracing.active is None
