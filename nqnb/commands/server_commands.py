"""The command ``nqnb up``, which runs a nats-server until Ctrl-C, or in the background until ``nqnb up --stop``."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import platformdirs

from nqnb.client import connect
from nqnb.commands.arguments import exclusive_flag
from nqnb.commands.command import Command, front_of
from nqnb.commands.command_records import DetachedServer, Preview, ServerUp
from nqnb.commands.param_types import OPEN_STATES, FilePath, queue_name
from nqnb.concurrency import first_of
from nqnb.errors import DevServerError, NqnbError
from nqnb.server import detached
from nqnb.server.detached import Condition, Detached
from nqnb.server.devserver import DevServer
from nqnb.settings import Settings

_POLL_SECONDS = 0.5
"""The interval between checks that the server is still running."""
_DEFAULT_PORT = 4222
_FAREWELL_SECONDS = 2.0
"""The time limit for counting the remaining tasks after Ctrl-C."""


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb up
  nqnb up --port 4333 --store-dir ./jetstream
  nqnb up --go-queue resize
  nqnb up --detach
  nqnb up --stop
""",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Port to listen on; 0 means any free port  [4222; with --detach: the previous port, or else any]",
    show_default=False,
)
@click.option(
    "--store-dir",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder in which tasks are stored  [a folder for each port in your user data folder]",
)
@click.option(
    "go_queues",
    "--go-queue",
    type=queue_name,
    multiple=True,
    metavar="QUEUE",
    help="Make the cancels of this queue visible to unpatched Go workers; repeatable",
)
@click.option("--detach", is_flag=True, help="Run the server in the background; other commands find it automatically")
@click.option("--status", is_flag=True, help="Show the background server; exit code 0 means that it is running")
@click.option("stops", "--stop", is_flag=True, help="Stop the background server; its tasks are kept")
@click.option("--yes", "-y", is_flag=True, help="With --stop: do not ask for confirmation")
@click.pass_context
def up(
    ctx: click.Context,
    port: int | None,
    store_dir: Path | None,
    go_queues: tuple[str, ...],
    detach: bool,
    status: bool,
    stops: bool,
    yes: bool,
) -> DetachedServer | None:
    """Run a nats-server on this machine until Ctrl-C.

    The server program is installed with nqnb. The server has JetStream enabled and listens on 127.0.0.1 only.

    With --detach, the server runs in the background, even after this shell exits. Each user can have one such
    server, which requires a token that only this user can read. Commands and notebooks use this server unless an
    option, NATS_URL or a NATS CLI context names another server. Workers and commands that have connected to this
    server reconnect only to this server, so a server in the foreground does not replace it.

    The tasks are kept when the server stops. To start with an empty server, stop the server, and then delete the store
    folder. `nqnb up --status` shows this folder while the server is running, and `nqnb up --stop` shows the folder when
    the server has stopped.
    """
    mode = exclusive_flag(detach=detach, status=status, stop=stops)
    if mode in ("stop", "status") and (port is not None or store_dir is not None or go_queues):
        raise click.UsageError(
            f"too many options: --{mode} cannot be combined with --port, --store-dir or --go-queue, which apply only "
            f"when a server is started. Use --{mode} alone"
        )
    if mode == "status":
        return _status()
    if mode == "stop":
        return stop(ctx, yes)
    if mode == "detach":
        return _detach(ctx, port, store_dir, go_queues)
    _serve(ctx, _DEFAULT_PORT if port is None else port, store_dir, go_queues)
    return None


def _serve(ctx: click.Context, port: int, store_dir: Path | None, go_queues: tuple[str, ...]) -> None:
    front = front_of(ctx)
    # Two servers must never share a store, so each port has its own folder.
    named_store = store_dir
    if store_dir is None and port:
        store_dir = Path(platformdirs.user_data_dir("nqnb", appauthor=False), f"server-{port}")

    again = []
    if named_store is not None:
        again += ["--store-dir", str(named_store.absolute())]
    for queue in go_queues:
        again += ["--go-queue", queue]

    async def serve() -> None:
        async with front.stop_requested() as stop, DevServer(port, store_dir, go_queues) as server:
            front.show(ServerUp(server.url, server.store_dir, server.version, server.pid))
            other = detached.look()
            if other.condition is Condition.RUNNING and other.server is not None:
                front.say(
                    f"nqnb: your detached server ({other.server.url}) is running too; commands and notebooks use the "
                    "detached server unless NATS_URL or a NATS CLI context is set"
                )
            while server.running and not stop.is_set():
                await first_of(stop, timeout=_POLL_SECONDS)
            if not stop.is_set():
                raise DevServerError(
                    f"the nats-server at {server.url} failed: it exited unexpectedly. Start it again with `nqnb up`."
                )
            used = server.url.rpartition(":")[2]
            port_option = [] if used == f"{_DEFAULT_PORT}" else ["--port", used]
            front.say(await _farewell(server, ["nqnb", "up", *port_option, *again], temporary=store_dir is None))

    front.run(serve)


async def _farewell(server: DevServer, again: list[str], *, temporary: bool) -> str:
    """Return the final message: how many tasks are kept, where they are stored, and how to restart the server."""
    try:
        seconds = _FAREWELL_SECONDS
        async with connect(Settings.local(server.url, connect_timeout=seconds, request_timeout=seconds)) as nq:
            tasks = await asyncio.wait_for(nq.tasks(status=OPEN_STATES), _FAREWELL_SECONDS)
    except (NqnbError, asyncio.TimeoutError):
        count = "its tasks are"
    else:
        count = "1 queued or running task is" if len(tasks) == 1 else f"{len(tasks):,} queued or running tasks are"
    if temporary:
        return f"nqnb: the server is stopping; {count} removed with its temporary store. To keep tasks, use --store-dir"
    return f"nqnb: the server is stopping; {count} kept in {server.store_dir}. To restart, run `{shlex.join(again)}`"


def _detach(ctx: click.Context, port: int | None, store_dir: Path | None, go_queues: tuple[str, ...]) -> DetachedServer:
    former = detached.former_port()
    server, new = detached.start(port or 0, store_dir, go_queues)
    if new:
        if not port and former not in (0, server.port):
            front_of(ctx).say(
                f"nqnb: another program is using the previous port {former}, so the server listens on {server.port}; "
                "clients of your detached server reconnect to the new port automatically"
            )
        return _record("running", "Your detached server is running; `nqnb up --stop` stops it", server)
    if (port and port != server.port) or store_dir is not None or go_queues:
        front_of(ctx).say(
            "nqnb: the options were ignored, because the server is already running; "
            "to apply the options, first stop the server with `nqnb up --stop`"
        )
    return _record("running", "Your detached server is already running", server)


def _status() -> DetachedServer:
    found = detached.look()
    if found.condition is Condition.RUNNING:
        return _record("running", "Your detached server is running", found.server)
    problem = f"{found.problem[:1].upper()}{found.problem[1:]}"
    note = problem or "No detached server is running; `nqnb up --detach` starts one"
    return _record(found.condition.value, note, found.server, ok=False)


def stop(ctx: click.Context, yes: bool, before: Callable[[], None] = lambda: None) -> DetachedServer:
    """Show the unfinished tasks on the detached server, ask for confirmation, and stop the server.

    Args:
        ctx: the context of the command.
        yes: whether the user has already confirmed with an option.
        before: a function to call after the confirmation, just before the server is stopped.

    Raises:
        NqnbError: the user declined, or the front end cannot ask the user (`NeedsYes`).
    """
    front = front_of(ctx)
    found = detached.look()
    if found.condition in (Condition.RUNNING, Condition.SILENT) and found.server is not None:
        question = _question(ctx, found.server, found.problem)
        if question and not yes and not front.confirm(f"{question} Stop it?"):
            raise NqnbError("the server was not stopped: you did not confirm. Answer y, or add --yes.")
    before()
    stopped = detached.stop()
    if stopped is None:
        stale = found.condition is Condition.STALE
        removed = "; the files of a dead server were removed" if stale else ""
        return _record("none", f"No detached server is running{removed}")
    return _record("stopped", "Your detached server was stopped; its tasks are kept", stopped)


def _question(ctx: click.Context, server: Detached, problem: str) -> str:
    """Return a warning about unfinished tasks on the server, or an empty string if all tasks have ended."""
    front = front_of(ctx)

    async def open_tasks() -> Preview:
        async with connect(Settings.local(server.url, token=server.token)) as nq:
            return Preview.of(await nq.tasks(status=OPEN_STATES))

    try:
        if problem:
            raise DevServerError(problem)
        preview = front.run(open_tasks)
    except NqnbError as error:
        return f"{str(error).rstrip('.')}. The server may still have unfinished tasks."
    if not preview.ids:
        return ""
    if not front.json:
        front.show(preview)
    count = "1 task is" if len(preview.ids) == 1 else f"{len(preview.ids):,} tasks are"
    return (
        f"{count} queued or running on the server. Stopping the server does not delete tasks: they continue when the "
        "server is started again."
    )


def _record(state: str, note: str, server: Detached | None = None, *, ok: bool = True) -> DetachedServer:
    if server is None:
        return DetachedServer(state, note, ok)
    return DetachedServer(
        state,
        note,
        ok,
        url=server.url,
        pid=server.pid,
        keeper=server.keeper,
        store=server.store,
        version=server.version,
        started_at=server.started_at,
    )
