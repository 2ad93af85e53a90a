"""Commands for workers: ``nqnb workers`` lists the workers, and ``nqnb worker`` runs a worker."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click

from nqnb.client import Client
from nqnb.commands.arguments import log_format_option
from nqnb.commands.command import Command, NewLoop, ask, front_of, options_of
from nqnb.commands.command_records import Workers
from nqnb.commands.param_types import AtLeast, health_address, metrics_address, queue_weights
from nqnb.commands.worker_processes import ParentLink, WorkerProcesses
from nqnb.commands.worker_reload import Reloader, watched_folders
from nqnb.error_text import clause, kind_of
from nqnb.errors import NqnbError
from nqnb.listen_address import ALL_INTERFACES, MAX_PORT, ListenAddress
from nqnb.server.server_choice import resolve
from nqnb.settings import Settings
from nqnb.worker.worker import Worker

log = logging.getLogger("nqnb.worker")


class UserCodeError(NqnbError):
    """The worker's module cannot be imported. The ``traceback`` attribute omits the frames of nqnb."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


@click.command("workers", cls=Command, epilog="\b\nExamples:\n  nqnb workers\n  nqnb workers --min-workers 1")
@click.option("--min-workers", type=AtLeast(0), default=0, metavar="N", help="Fail if fewer than N workers are alive")
@click.pass_context
def list_workers(ctx: click.Context, min_workers: int) -> Workers:
    """List the nqnb workers that are alive.

    Go workers are not listed, because they do not register with the server.
    """

    async def question(nq: Client) -> Workers:
        return Workers(sorted(await nq.workers(), key=lambda each: (each.host, each.pid, each.id)), min_workers)

    return ask(ctx, question)


@click.command(
    cls=Command,
    epilog="""\b
A file jobs.py with a worker:
  import nqnb
  worker = nqnb.Worker()
  @worker.handler("count")
  def count(job, payload):
      for done in range(payload):
          job.progress(done, payload)
          job.wait(1)

\b
Examples:
  nqnb worker jobs:worker
  nqnb worker app.tasks:worker --concurrency 16
  nqnb worker app.tasks:worker --queues high=6,default=3,low=1
  nqnb worker app.tasks:worker --processes 4
  nqnb worker app.tasks:worker --metrics 9464 --health 8080 --log-format json
  nqnb worker jobs:worker --reload
""",
)
@click.argument("target", metavar="MODULE:WORKER")
@click.option("--concurrency", type=AtLeast(1), metavar="N", help="Run at most N tasks at once  [set in MODULE]")
@click.option(
    "--queues",
    type=queue_weights,
    metavar="QUEUES",
    help="The weights of the queues (high=6,low=1), or their strict order (high,low)  [set in MODULE]",
)
@click.option("--processes", type=AtLeast(1), metavar="N", help="Run N processes, each with its own concurrency")
@click.option(
    "--loop",
    type=click.Choice(("auto", "asyncio", "uvloop")),
    default="auto",
    show_default=True,
    help="The event loop to use; auto selects uvloop if nqnb[fast] installed it",
)
@click.option(
    "--metrics",
    type=metrics_address,
    metavar="[HOST:]PORT",
    help="Serve metrics for Prometheus; without HOST, on all interfaces; with --processes, each further process uses "
    "the next port",
)
@click.option(
    "--health",
    type=health_address,
    metavar="[HOST:]PORT",
    help="Answer /healthz and /readyz; without HOST, only on 127.0.0.1; with --processes, each further process uses "
    "the next port",
)
@click.option(
    "--reload", is_flag=True, help="Restart the worker when a Python file of its package changes; for development"
)
@click.option("--task-logs", is_flag=True, help="Store what tasks print and log; `nqnb task logs` prints it")
@log_format_option
@click.option("--member", is_flag=True, hidden=True)
@click.pass_context
def worker(
    ctx: click.Context,
    target: str,
    concurrency: int | None,
    queues: Mapping[str, int] | None,
    processes: int | None,
    loop: str,
    metrics: ListenAddress | None,
    health: ListenAddress | None,
    reload: bool,
    task_logs: bool,
    log_format: str,
    member: bool,
) -> None:
    """Run a worker, which executes tasks from its queues until Ctrl-C.

    MODULE is the name of a Python module, which may be in the current folder. WORKER is the name of an nqnb.Worker in
    that module. SIGINT (Ctrl-C) or SIGTERM stops the worker. Running tasks may then continue for the worker's
    shutdown_timeout, which is 10 seconds by default. A second signal stops these tasks immediately.

    If the handlers are coroutines or run in threads, a process can use only about one CPU core. --processes starts
    several processes, each with the full concurrency of the worker. A process that crashes is replaced. Signals are
    forwarded to all processes. The exit code is the highest exit code of the processes.

    --health serves two pages for Kubernetes, Docker and load balancers. /healthz fails if the event loop has been
    blocked for more than 60 seconds. It also fails if the connection has been lost for more than 5 minutes and for more
    than the longest ack wait. /readyz fails until the worker can receive cancels and tasks, and again when the worker
    begins to stop. It also fails while the event loop is blocked, during each reconnect, and while the worker is paused
    (SIGTSTP).

    --reload watches the package of MODULE, or the folder of a module without a package, and requires nqnb[reload].
    --reload and --processes are not available on Windows.
    """
    front = front_of(ctx)
    front.start_logging(json=log_format == "json")
    options = options_of(ctx)
    parent = ParentLink() if member else None
    if parent is not None:
        options = {**options, **parent.options}
    if reload:
        ctx.exit(front.run(_reloader(ctx, options).run))
    found = _find_worker(target)
    if processes is not None:
        ctx.exit(front.run(_processes(ctx, found, options).run))
    found.settings = worker_settings(found.settings, options)
    if concurrency is not None:
        found.concurrency = concurrency
    if queues is not None:
        found.queues = dict(queues)
    if metrics is not None:
        found.metrics = metrics
    if health is not None:
        found.health = health
    if task_logs:
        found.task_logs = True
    found.dedicated = True
    front.run(found.serve if parent is None else lambda: parent.serve(found), new_loop_of(loop))


def new_loop_of(choice: str) -> NewLoop | None:
    """Return a function that creates a worker's event loop, or None to use asyncio's default event loop.

    Raises:
        UsageError: uvloop was chosen, but cannot be imported.
    """
    if choice == "asyncio" or (choice == "auto" and sys.version_info >= (3, 14)):
        # nqnb[fast] does not install uvloop on Python 3.14 and later, so nqnb is not tested with uvloop there.
        return None
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError as error:
        if choice == "auto":
            return None
        raise click.UsageError(
            f"--loop uvloop is not available: uvloop cannot be imported ({clause(error)}). "
            "Install uvloop with: pip install 'nqnb[fast]' (from Python 3.14: pip install uvloop)"
        ) from None
    new_loop: NewLoop = uvloop.new_event_loop
    return new_loop


_WILDCARDS = {ALL_INTERFACES, "::"}
"""The hosts that stand for all interfaces."""


def _processes(ctx: click.Context, found: Worker, options: dict[str, Any]) -> WorkerProcesses:
    if sys.platform == "win32":
        raise click.UsageError(
            "--processes is not available: Windows has no POSIX signals. Start several workers instead"
        )
    given = {"--metrics": ctx.params["metrics"] or found.metrics, "--health": ctx.params["health"] or found.health}
    endpoints = {option: address for option, address in given.items() if address is not None}
    count = ctx.params["processes"]
    _check_ports(endpoints, count)
    return WorkerProcesses(_arguments(ctx), options, count, found.shutdown_timeout, endpoints)


def _check_ports(endpoints: Mapping[str, ListenAddress], count: int) -> None:
    """Check that the ports of all processes are valid, and that no port is used twice.

    Args:
        endpoints: the addresses of the first process, by option. Each further process uses the next port of each
            address.
        count: the number of processes.

    Raises:
        UsageError: the ports cannot be used.
    """
    used = {option: address for option, address in endpoints.items() if address.port}  # 0 means any free port
    for option, address in used.items():
        if address.port + count - 1 > MAX_PORT:
            raise click.UsageError(
                f"{option} {address} is invalid with --processes {count}: the last port would be "
                f"{address.port + count - 1}. Use a port up to {MAX_PORT + 1 - count}"
            )
    hosts = {address.host for address in used.values()}
    ports = [address.port for address in used.values()]
    if len(used) > 1 and (len(hosts) == 1 or hosts & _WILDCARDS) and max(ports) - min(ports) < count:
        raise click.UsageError(
            f"{' and '.join(f'{option} {address}' for option, address in used.items())} overlap with --processes "
            f"{count}: each further process adds 1 to each port. Use ports that are at least {count} apart"
        )


def _reloader(ctx: click.Context, options: dict[str, Any]) -> Reloader:
    if sys.platform == "win32":
        raise click.UsageError("--reload is not available: Windows has no POSIX signals. Restart the worker yourself")
    if ctx.params["processes"] is not None:
        raise click.UsageError(
            "--reload and --processes cannot be combined: --reload runs a single process. Use only one of the options"
        )
    module, _ = _split_target(ctx.params["target"])
    endpoints = {f"--{name}": ctx.params[name] for name in ("metrics", "health")}
    given = [part for option, address in endpoints.items() if address is not None for part in (option, f"{address}")]
    return Reloader([*_arguments(ctx), *given], options, watched_folders(module))


def _arguments(ctx: click.Context) -> list[str]:
    """Return a worker process's command-line arguments after ``nqnb worker``, without the addresses to listen on."""
    given = ctx.params
    return [
        given["target"],
        *(() if given["concurrency"] is None else ("--concurrency", f"{given['concurrency']}")),
        *(() if given["queues"] is None else ("--queues", _weights_text(given["queues"]))),
        *(["--json"] if front_of(ctx).json else []),
        *(["--task-logs"] if given["task_logs"] else []),
        *("--loop", given["loop"], "--log-format", given["log_format"]),
    ]


def _weights_text(weights: Mapping[str, int]) -> str:
    """Return the value of ``--queues`` for weights; see `nqnb.commands.param_types.queue_weights`."""
    return ",".join(f"{queue}={weight}" if weight else queue for queue, weight in weights.items())


def worker_settings(own: Settings, options: dict[str, Any]) -> Settings:
    """Return the worker's settings, overridden by the command's options. If no server is named, choose a server."""
    choice = resolve(Settings.of(own, **options))
    if choice.detached:
        log.info("no server was specified, so the worker uses your detached server at %s", choice.settings.url)
    return choice.settings


def _split_target(target: str) -> tuple[str, str]:
    name, _, path = target.partition(":")
    if not name or not path or name.startswith(".") or name.endswith(".py") or "/" in name:
        example = Path(name).name.removesuffix(".py").lstrip(".") or "mymodule"
        raise click.UsageError(
            f"worker {target!r} is invalid: expected MODULE:WORKER. For example, "
            f"change to the module's folder, and use {example}:{path or 'worker'}"
        )
    return name, path


def _find_worker(target: str) -> Worker:
    name, path = _split_target(target)
    module = _import(name)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            there = " or ".join(f"{name}:{each}" for each, value in vars(module).items() if isinstance(value, Worker))
            raise click.UsageError(
                f"worker {target!r} is invalid: module {name!r} has no attribute {path!r}. "
                + (f"Use {there}" if there else "Define an nqnb.Worker in the module")
            )
        found = getattr(found, part)
    if not isinstance(found, Worker):
        raise click.UsageError(
            f"worker {target!r} is invalid: expected an nqnb.Worker, got {kind_of(found)}. "
            "Use the name of a Worker in the module"
        )
    return found


def _import(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _user_error(name, error) from error
        raise click.UsageError(
            f"module {error.name!r} cannot be imported: it is not in {os.getcwd()!r}, and is not installed. "
            "Change to the module's folder, or install the module"
        ) from None
    except (Exception, SystemExit) as error:
        raise _user_error(name, error) from error


def _user_error(name: str, error: BaseException) -> UserCodeError:
    inner: TracebackType | None = error.__traceback__
    while inner is not None and inner.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("nqnb", "importlib"):
        inner = inner.tb_next
    text = "".join(traceback.format_exception(type(error), error, inner)).rstrip()
    return UserCodeError(
        f"module {name!r} cannot be imported: {type(error).__name__}: {clause(error)}. See the traceback.", text
    )
