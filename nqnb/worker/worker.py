"""The public `Worker` class: its handlers, options and life cycle."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from nqnb.concurrency import handled_signals
from nqnb.error_text import readable, shown
from nqnb.errors import BadInput, ConnectionFailed, InvalidHandler
from nqnb.garbage import rare_collections
from nqnb.inputs import Duration, check_count, check_flag, check_seconds
from nqnb.listen_address import THIS_MACHINE, ListenAddress
from nqnb.log_format import LOGGED, WorkerLogged
from nqnb.metrics.worker_metrics import WorkerMetrics, WorkerNow
from nqnb.records import WorkerInfo, moment
from nqnb.retry import Backoff
from nqnb.settings import Settings
from nqnb.store import StateStore, check_store
from nqnb.text import in_parentheses
from nqnb.version import __version__
from nqnb.worker.fetch_policy import check_queues
from nqnb.worker.handlers import Handler, Isolation, check_concurrency, check_decorated, make_handler
from nqnb.worker.service_manager import ServiceManager

if TYPE_CHECKING:
    from nqnb.http_endpoint import HttpEndpoint
    from nqnb.worker.runtime import Runtime
    from nqnb.worker.typed_task import Register

log = logging.getLogger("nqnb.worker")

F = TypeVar("F", bound=Callable[..., Any])

_FIRST_IDLE_CHECK_SECONDS, _IDLE_CHECK_SECONDS = 0.02, 0.3
"""The first and the longest pause between two checks for waiting tasks."""
_HOST_CHARACTERS = 255
"""The maximum length of the host name in a worker's presence record."""


class State(enum.Enum):
    """A state in the life cycle of a worker."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Worker:
    """A worker, which runs the tasks of one or more queues.

    Args:
        settings: `Settings`, or the server's address. The default is chosen when the worker starts: ``NATS_URL``, then
            a context of the NATS CLI, then your detached server (`nqnb up --detach`), then ``nats://127.0.0.1:4222``.
        concurrency: the maximum number of tasks that run at the same time. `handler` can set a lower limit for a queue.
        queues: how the queues share the worker while it is busy. ``{"high": 6, "default": 3, "low": 1}`` gives each
            queue a weight: of ten tasks that start, six are from ``high``. If a queue has no tasks, its share goes to
            the other queues. A list, such as ``["high", "low"]``, sets a strict order: a task of ``low`` starts only if
            ``high`` has no waiting tasks. By default, the queues are served in strict order of registration.
        shutdown_timeout: how long a stopping worker waits for its tasks to finish, in seconds or as a timedelta. Tasks
            that are still running after that time are stopped, and the server redelivers them.
        poison_limit: how many workers in a row may die or go silent while running a task before the task is marked as
            failed.
        shutdown_on_disconnect: whether to stop the worker and its tasks when the connection is lost. NQ has the same
            option. By default, the worker waits for the server, and stops only tasks whose leases have run out.
        progress_raises: whether `Job.progress` raises `JobCancelled` if a handler in a thread or process must stop.
            If True, which is the default, a loop that reports progress stops at its next report.
        store: the store for task states. The default is the bucket ``nq-store``.
        metrics: the port on which the worker serves metrics for Prometheus while it runs, or an address such as
            ``"127.0.0.1:9464"``. A port without a host means all interfaces. By default, no metrics are served.
            Requires ``nqnb[metrics]``.
        health: the port on which the worker answers health checks while it runs, or an address such as
            ``"0.0.0.0:8080"``. ``/healthz`` reports whether the worker is alive, and ``/readyz`` reports whether it can
            receive cancels and tasks. A port without a host means 127.0.0.1. By default, no health checks are served.
        task_logs: whether to store task logs, that is, the text that handlers print and log. The text is stored in the
            stream ``nq-logs``, which `Client.logs` reads. Printed text does not go to the worker's output in this case.
            Task logs are off by default, because storing them adds writes for each task that prints, uses storage on
            the server, and requires permission to create and write the stream.
        **options: fields of `Settings` to override.

    Run the worker with ``async with worker:`` or ``await worker.serve()`` in a program, or with ``worker.run()`` in a
    script. Each task runs at least once, and exactly one outcome is recorded.

    Raises:
        BadInput: a setting or an argument is invalid.

    Examples:
        >>> worker = nqnb.Worker(concurrency=8)
        >>> @worker.handler("thumbnail", backoff=nqnb.Backoff(1, 60))
        ... async def thumbnail(job: nqnb.Job, payload: dict) -> str:
        ...     return payload["path"]
        >>> async with worker:
        ...     task = await nq.submit("thumbnail", {"path": "a.png"}, retry=3)
        ...     print(await task)
        a.png
    """

    def __init__(
        self,
        settings: Settings | str | Sequence[str] | None = None,
        *,
        concurrency: int = 8,
        queues: Mapping[str, int] | Sequence[str] | None = None,
        shutdown_timeout: Duration = 10.0,
        poison_limit: int = 5,
        shutdown_on_disconnect: bool = False,
        progress_raises: bool = True,
        store: StateStore | None = None,
        metrics: int | str | None = None,
        health: int | str | None = None,
        task_logs: bool = False,
        **options: Any,
    ) -> None:
        self.concurrency = check_concurrency(concurrency)
        self.queues = None if queues is None else check_queues(queues)
        """The weights of the queues in their order, or None. In a strict order, each weight is 0."""
        self.shutdown_timeout = check_seconds("shutdown_timeout", shutdown_timeout)
        self.poison_limit = check_count(
            "poison_limit", poison_limit, 1, 2**31 - 1, "the number of workers that may go silent"
        )
        self.shutdown_on_disconnect = check_flag("shutdown_on_disconnect", shutdown_on_disconnect)
        self.progress_raises = check_flag("progress_raises", progress_raises)
        self.metrics = None if metrics is None else ListenAddress.of(metrics)
        """The address of the metrics, or None."""
        self.health = None if health is None else ListenAddress.of(health, "health", THIS_MACHINE)
        """The address of the health checks, or None."""
        self.task_logs = check_flag("task_logs", task_logs)
        self.dedicated = False
        """Whether the process does nothing but run this worker.

        If so, garbage is collected less often. Also, once `serve` has started the worker, `gc.freeze` excludes all
        objects that exist at that time (mostly modules) from garbage collection. Both measures make short tasks faster.
        """
        self._given = (settings, options)
        self.settings = self._own_settings = Settings.of(settings, **options)
        self.id = _new_id()
        self.state = State.NEW
        self.handlers: dict[str, Handler] = {}
        self._store = check_store(store)
        self._runtime: Runtime | None = None
        self._endpoints: list[HttpEndpoint] = []
        self._start_ended = asyncio.Event()
        """The event that is set when the current or last start has succeeded or failed."""
        self._stop = asyncio.Event()
        """The event that is set when the worker must stop or has stopped."""
        self._stopped = asyncio.Event()
        self._hurried = False
        """Whether `request_stop` was called twice."""
        self._started = datetime.now(timezone.utc)

    def __repr__(self) -> str:
        return f"<Worker {self.id} {self.state.value}, queues {', '.join(self.handlers) or 'none'}>"

    def handler(
        self,
        queue: str,
        *,
        concurrency: int | None = None,
        backoff: Backoff | None = None,
        grace: Duration = 1.0,
        isolation: Isolation | None = None,
        reuse: int | None = None,
        is_failure: Callable[[Exception], bool] | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated function as the handler of a queue.

        Args:
            queue: the queue name. Unless the worker was created with ``queues``, the queues are served in the order in
                which their handlers were registered.
            concurrency: the maximum number of the queue's tasks that run at the same time in this worker. At this
                limit, the worker fetches no more tasks of the queue, so that other workers can run them. The default is
                the worker's ``concurrency``, which also limits the total.
            backoff: the delays before retries. The default is `Backoff()`.
            grace: the time between two attempts to stop the function, in seconds or as a timedelta. A coroutine is
                cancelled immediately, and then again after each ``grace``. A function in a thread first has this time
                to call ``job.progress`` or to check ``job.cancelled``. Then an exception is raised in the thread. A
                process immediately receives SIGINT (which raises `JobCancelled` in a plain function), SIGTERM after
                ``grace``, and SIGKILL a quarter of a second later. If the task's lease is running out, all attempts are
                made before the server redelivers the task.
            isolation: where the function runs. The default is ``"coroutine"`` for an async function and ``"thread"``
                for any other function. ``"process"`` runs each task in a separate process. Only a process can always be
                stopped, and a crash of the process does not affect the worker. Processes that the function leaves
                running are killed: all descendants on Linux, and the process group on other systems. cloudpickle must
                be able to pickle the function. The function sees the environment variables that the worker has when
                the task starts.
            reuse: the maximum number of tasks that one process runs, one after another; requires
                ``isolation="process"``. The default is 1: each task runs in a separate process. A higher number makes
                short tasks much faster, but the tasks of a process share the imported modules and their global
                variables. A process is not reused after a stop, or if the function left child processes running or
                raised an exception such as `SystemExit`.
            is_failure: a function that is called with the exception of a failed attempt. If the function returns True,
                the task is not retried, as with NQ's ``isFailureFn``.

        The function takes ``(job, payload)``, ``(job)`` or ``(payload)``. A single parameter receives the payload if it
        is named ``payload`` or is annotated with a type other than `Job`. Without an annotation, the payload is passed
        as decoded JSON. With the annotation ``bytes``, the payload is passed as raw bytes. With any other type
        (such as a dataclass, a Struct, a TypedDict or a path), the payload is converted to that type and validated. The
        return value, encoded as JSON, is the task's result.

        Raises:
            InvalidQueueName: the queue name is invalid.
            InvalidHandler: the function cannot handle tasks, or the queue already has a handler.
        """
        queue = check_decorated(queue, "@worker.handler")

        def register(function: F) -> F:
            if queue in self.handlers:
                raise InvalidHandler(
                    f"queue {queue!r} already has a handler: {shown(self.handlers[queue].function)}. "
                    "Register only one function per queue."
                )
            if self.state in (State.STARTING, State.RUNNING, State.STOPPING):
                raise InvalidHandler(
                    f"cannot register a handler for queue {queue!r}: the worker is {self.state.value}. "
                    "Register handlers before the worker starts."
                )
            self.handlers[queue] = make_handler(
                queue,
                function,
                concurrency=concurrency,
                backoff=backoff,
                grace=grace,
                isolation=isolation,
                reuse=reuse,
                is_failure=is_failure,
                progress_raises=self.progress_raises,
            )
            return function

        return register

    def task(self, queue: str, **options: Any) -> Register:
        """Register the decorated function as the handler of a queue, and return a task that can be submitted.

        If the decorated function is named ``resize``, ``await resize.submit(nq, payload)`` submits a task, and
        ``resize(job, payload)`` calls the function directly. Type checkers check the payload against the annotation of
        the function's payload parameter, and know the type of the result.

        Args:
            queue: the queue name.
            **options: options of `handler`, such as ``isolation`` and ``backoff``.

        Raises:
            InvalidQueueName, InvalidHandler: see `handler`.
        """
        from nqnb.worker.typed_task import TaskFunction

        def register(function: Callable[..., Any], /) -> Any:
            return TaskFunction(queue, self.handler(queue, **options)(function))

        check_decorated(queue, "@worker.task")
        return register

    def swap(self, handler: Handler, concurrency: int) -> None:
        """Replace the handler of a queue and the worker's concurrency. Running tasks finish with the old handler.

        Call this method on the worker's event loop.

        Args:
            handler: the new handler of the queue ``handler.queue``.
            concurrency: the new maximum number of tasks that the worker runs at the same time.

        Raises:
            BadInput: ``concurrency`` is invalid.
            InvalidHandler: ``handler`` is not a `Handler`, or the worker does not serve the handler's queue.
        """
        if not isinstance(handler, Handler):
            raise InvalidHandler(
                f"handler={shown(handler)} is invalid: expected a Handler. "
                "Create it with nqnb.worker.handlers.make_handler."
            )
        concurrency = check_concurrency(concurrency)
        if handler.queue not in self.handlers:
            raise InvalidHandler(
                f"cannot replace the handler of queue {handler.queue!r}: the worker does not serve this queue. "
                "Register a handler before the worker starts."
            )
        resized = (concurrency, handler.concurrency) != (self.concurrency, self.handlers[handler.queue].concurrency)
        self.handlers[handler.queue] = handler
        self.concurrency = concurrency
        if resized and self._runtime is not None:
            self._runtime.resize()

    @property
    def malformed(self) -> int:
        """The number of messages that the worker dropped because they were not tasks."""
        return 0 if self._runtime is None else self._runtime.malformed

    @property
    def running(self) -> list[str]:
        """The ids of the tasks that the worker is running."""
        return [] if self._runtime is None else list(self._runtime.runs)

    def info(self, running: list[str], ttl: float) -> WorkerInfo:
        """Return the worker's presence record, which tells clients that the worker is alive.

        Args:
            running: the ids of the running tasks.
            ttl: the number of seconds for which the record is valid.
        """
        return WorkerInfo(
            id=self.id,
            host=readable(socket.gethostname(), _HOST_CHARACTERS),
            pid=os.getpid(),
            version=__version__,
            queues=list(self.handlers),
            concurrency=self.concurrency,
            running=running,
            started_at=self._started,
            ttl=ttl,
        )

    async def start(self) -> None:
        """Connect to the server, and start pulling tasks. A worker that has stopped can be started again.

        Raises:
            InvalidHandler: no handler is registered, the queues of the handlers differ from the worker's ``queues``,
                or the worker is already starting, running or stopping.
            MetricsUnavailable, HealthUnavailable: the metrics or the health checks cannot be served.
            NoServer, NoJetStream, ServerRefused: see `nqnb.Client.open`.
        """
        await self._start()
        self._log_start()

    async def _start(self) -> None:
        if not self.handlers:
            raise InvalidHandler(
                "the worker cannot start: it has no handler. Decorate a function with @worker.handler(queue)."
            )
        if self.state in (State.STARTING, State.RUNNING, State.STOPPING):
            raise InvalidHandler(
                f"the worker cannot start: it is already {self.state.value}. "
                "Wait until it has stopped, or create another Worker."
            )
        self._order_handlers()
        if self.state is State.STOPPED:
            # Other programs must not mistake the restarted worker for the stopped worker.
            self.id, self._hurried = _new_id(), False
            self._stop, self._stopped = asyncio.Event(), asyncio.Event()
        # A second start at the same time would create a runtime that nothing stops.
        self.state, self._start_ended = State.STARTING, asyncio.Event()
        # The tasks and callbacks that are created here inherit the log fields.
        token = LOGGED.set(WorkerLogged(self.id))
        try:
            await self._connect(self._open_endpoints())
            self.state = State.RUNNING
        except BaseException:
            # The server may still have the cancel consumer of this id, which delivers to the failed start. With another
            # id, the next start creates its own consumer.
            self.id = _new_id()
            await self._close_endpoints()
            raise
        finally:
            LOGGED.reset(token)
            if self.state is not State.RUNNING:
                self.state = State.NEW
            self._start_ended.set()

    def _log_start(self) -> None:
        loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
        log.info(
            "worker %s is serving %s%s",
            self.id,
            ", ".join(self.handlers),
            "" if loop == "asyncio" else f" ({loop})",
            extra={"worker": self.id},
        )

    def _open_endpoints(self) -> WorkerMetrics | None:
        """Start serving the metrics and the health checks. Return the metrics, or None if they are not served."""
        metrics = None
        # Import late, because importing an HTTP server takes milliseconds.
        if self.metrics is not None:
            from nqnb.metrics.endpoint import MetricsEndpoint

            metrics = WorkerMetrics(self.handlers, self._now)
            self._endpoints.append(MetricsEndpoint(self.metrics, metrics))
            log.info("serving metrics on http://%s/metrics", self._endpoints[-1].address)
        if self.health is not None:
            from nqnb.worker.health import HealthEndpoint

            self._endpoints.append(HealthEndpoint(self.health, self._failure, self._not_ready))
            log.info("serving health checks on http://%s/healthz and /readyz", self._endpoints[-1].address)
        return metrics

    def _order_handlers(self) -> None:
        """Put the handlers into the order of ``queues``.

        Raise `InvalidHandler` unless there is one handler for each queue.
        """
        if self.queues is None:
            return
        if self.queues.keys() == self.handlers.keys():
            self.handlers = {queue: self.handlers[queue] for queue in self.queues}
            return
        without = sorted(self.queues.keys() - self.handlers.keys())
        if without:
            raise InvalidHandler(
                f"the worker cannot start: queue {without[0]!r} is in `queues`, but has no handler. "
                "Register a handler with @worker.handler, or remove the queue from `queues`."
            )
        missing = sorted(self.handlers.keys() - self.queues.keys())
        raise InvalidHandler(
            f"the worker cannot start: queue {missing[0]!r} has a handler, but is not one of the worker's `queues`. "
            "Add the queue to `queues`, or register the handler with another Worker."
        )

    async def _connect(self, metrics: WorkerMetrics | None) -> None:
        # Import late, because these modules import nats, which is needed only to connect.
        from nqnb.jetstream.backend import Backend
        from nqnb.server.server_choice import resolved
        from nqnb.worker.runtime import Runtime
        from nqnb.worker.task_logs import TaskLogs

        if self.settings is self._own_settings:
            # The environment may have changed since the worker was created or last started.
            settings, options = self._given
            self._own_settings = self.settings = await resolved(Settings.of(settings, **options))
        else:
            self.settings = await resolved(self.settings)
        backend = await Backend.open(self.settings, self._store)
        self._started = moment(backend.now()) or self._started
        weights = self.queues or {}
        self._runtime = Runtime(
            backend,
            self.id,
            self.handlers,
            weights=weights if any(weights.values()) else {},
            slots=lambda: self.concurrency,
            poison_limit=self.poison_limit,
            shutdown_on_disconnect=self.shutdown_on_disconnect,
            describe=self.info,
            metrics=metrics,
            logs=TaskLogs(backend, self.id) if self.task_logs else None,
        )
        try:
            await self._runtime.open()
        except BaseException:
            await self._runtime.close()
            raise

    def _now(self) -> WorkerNow:
        """Return the state of the worker for the metrics. Other threads call this method."""
        runtime = self._runtime
        if runtime is None:
            return WorkerNow(self.id)
        return WorkerNow(
            self.id,
            runtime.backend.connected,
            self.concurrency,
            runtime.running,
            runtime.cancelled_but_running(),
            runtime.malformed,
        )

    @property
    def _loss_reason(self) -> str:
        return "" if self._runtime is None else self._runtime.backend.loss_reason

    def _failure(self) -> str:
        """Return the reason why the worker must be restarted, or "". Other threads call this method."""
        return "" if self._runtime is None else self._runtime.failure()

    def _not_ready(self) -> str:
        """Return the reason why the worker cannot receive cancels and tasks, or "". Other threads call this method."""
        if self.state in (State.NEW, State.STARTING):
            return "the worker is starting"
        if self.state is not State.RUNNING or self._runtime is None:
            return f"the worker is {self.state.value}"
        return self._runtime.not_ready()

    async def _close_endpoints(self) -> None:
        endpoints, self._endpoints = self._endpoints, []
        await asyncio.gather(*(endpoint.close() for endpoint in endpoints))

    async def stop(self, shutdown_timeout: Duration | None = None) -> None:
        """Stop the worker. Tasks that are still running after ``shutdown_timeout`` are stopped and redelivered.

        The worker stops pulling tasks immediately. If another call is already stopping the worker, this call only waits
        until the worker has stopped. If another call is starting the worker, this call waits until the worker has
        started, and then stops it. If this call is cancelled, the running tasks are stopped immediately.

        Args:
            shutdown_timeout: how long to wait for running tasks, in seconds or as a timedelta. By default, the worker's
                ``shutdown_timeout`` is used.

        Raises:
            BadInput: ``shutdown_timeout`` is invalid, or an async handler of this worker calls the method. The worker
                continues to run.
        """
        seconds = check_seconds("shutdown_timeout", shutdown_timeout, none=True)
        if self._runtime is not None and self._runtime.is_handler(asyncio.current_task()):
            raise BadInput(
                "the worker cannot stop: an async handler of this worker cannot wait for its own end. "
                "Call worker.request_stop() instead."
            )
        await self._finish_start()
        if self.state is State.STOPPING:
            await self._stopped.wait()
            return
        if self.state is not State.RUNNING or self._runtime is None:
            return
        self.state = State.STOPPING
        try:
            default = 0.0 if self._hurried else self.shutdown_timeout
            await self._runtime.drain(default if seconds is None else seconds)
        finally:
            try:
                await self._runtime.close()
            finally:
                try:
                    await self._close_endpoints()
                finally:
                    self.state = State.STOPPED
                    self._stop.set()
                    self._stopped.set()
                    log.info("worker %s has stopped", self.id, extra={"worker": self.id})

    async def serve(self) -> None:
        """Start the worker, and run until it is stopped or the connection is lost permanently.

        `request_stop` and `stop` both stop the worker. This method returns once the worker has stopped.

        In the main thread, SIGINT and SIGTERM call `request_stop`, and SIGTSTP calls `pause`. If systemd has started
        this process, systemd is notified when the worker is ready, and then regularly while the worker is alive. A
        `dedicated` worker hides systemd's variables, such as ``NOTIFY_SOCKET``, from its handlers.

        Raises:
            ConnectionFailed: the connection was lost permanently, or an internal error in nqnb has stopped the worker.
            InvalidHandler, NoServer, NoJetStream, ServerRefused: see `start`.
        """
        manager = ServiceManager()
        with manager.hidden() if self.dedicated else contextlib.nullcontext():
            await self._start()
            # Report that the worker is ready only after `_signals` has installed the signal handlers. Until then,
            # SIGTERM would kill the worker.
            with self._signals(), manager.reporting(f"serving {', '.join(self.handlers)}"):
                try:
                    self._log_start()
                    with _frozen() if self.dedicated else contextlib.nullcontext():
                        await self.ended()
                finally:
                    # If `stop` or `request_stop` was called, a closed connection is not a failure.
                    failed = not self._is_leaving()
                    await self.stop()
        if failed and self._runtime is not None and self._runtime.crashed:
            raise ConnectionFailed(
                "the worker has stopped: an internal error occurred in nqnb. "
                "Copy the traceback from the worker's log into a bug report, and then start the worker again."
            )
        if failed:
            raise ConnectionFailed(
                f"the worker has stopped: the connection to {', '.join(self.settings.urls)} was lost"
                f"{in_parentheses(self._loss_reason)}. Check the server, and then start the worker again."
            )

    async def run_until_idle(self) -> None:
        """Run tasks until the queues of this worker are empty. This is useful for tests and for batch jobs.

        A queue counts as empty once every task in it has ended, including tasks that other workers are running. If the
        server supports schedules (nats-server 2.12 and later), tasks whose start time or retry is a minute or more away
        do not count, and remain in the queue. With an older server, this method waits for them. The tasks of a paused
        queue do not count either, and a warning is logged.

        If the worker is not running, this method starts it, and stops it at the end. If another call is starting the
        worker, this method waits until the worker has started. If `stop` or `request_stop` is called, this method
        returns even if tasks remain.

        Raises:
            ConnectionFailed: the connection was lost permanently, or an internal error in nqnb has stopped the worker.
            InvalidHandler, NoServer, NoJetStream, ServerRefused: see `start`.
        """
        await self._finish_start()
        if self.state is State.RUNNING:
            await self._wait_until_idle()
        else:
            async with self:
                await self._wait_until_idle()

    async def _finish_start(self) -> None:
        """If another call is starting the worker, or is about to, wait until the start has succeeded or failed."""
        if self.state in (State.NEW, State.STOPPED):
            # If an asyncio task was just created for `serve`, that task must start the worker first.
            await asyncio.sleep(0)
        while self.state is State.STARTING:
            await self._start_ended.wait()

    async def _wait_until_idle(self) -> None:
        pause = _FIRST_IDLE_CHECK_SECONDS
        while self._runtime is not None and not self._is_leaving():
            try:
                if await self._runtime.is_idle():
                    break
            except ConnectionFailed:
                # `stop` may have closed the connection during the check.
                if not self._is_leaving():
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _IDLE_CHECK_SECONDS)

    def _is_leaving(self) -> bool:
        """Return whether a call of `stop` or `request_stop` is stopping the worker."""
        return self.state is not State.RUNNING or self._stop.is_set()

    def pause(self) -> None:
        """Stop pulling tasks until the worker is restarted, but let the running tasks continue.

        SIGTSTP calls this method.
        """
        if self._runtime is not None:
            self._runtime.pause()

    def request_stop(self) -> None:
        """Make `serve` stop the worker. After a second call, `serve` no longer waits for running tasks."""
        if self._stop.is_set():
            self._hurried = True
            if self._runtime is not None:
                self._runtime.hurry()
        self._stop.set()

    def run(self) -> None:
        """Mark this worker as `dedicated`, and run `serve` in a new event loop until a signal stops the worker.

        Raises:
            BadInput: this thread is already running an event loop. Use ``await worker.serve()`` instead.
        """
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise BadInput(
                "run() cannot start: this thread is already running an event loop. Use `await worker.serve()`."
            )
        self.dedicated = True
        asyncio.run(self.serve())

    async def __aenter__(self) -> Worker:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def ended(self) -> None:
        """Wait until `request_stop` is called, the worker stops or fails, or the connection is lost permanently."""
        if self._runtime is None:
            return
        waits = [asyncio.ensure_future(self._stop.wait()), asyncio.ensure_future(self._runtime.gone())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waits:
                waiter.cancel()

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        if sys.platform == "win32":
            return contextlib.nullcontext()
        return handled_signals(
            {signal.SIGINT: self.request_stop, signal.SIGTERM: self.request_stop, signal.SIGTSTP: self.pause}
        )


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Exclude all existing objects from garbage collection, and collect garbage less often, until the block ends."""
    gc.collect()
    gc.freeze()
    try:
        with rare_collections():
            yield
    finally:
        gc.unfreeze()


def _new_id() -> str:
    return f"w-{secrets.token_hex(6)}"
