"""`nqnb up`: a nats-server of one's own, here until Ctrl-C, or detached until `nqnb up --stop`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import platformdirs

from nqnb.client import connect
from nqnb.commands.arguments import one_of
from nqnb.commands.complete import OPEN
from nqnb.commands.options import Command, front_of
from nqnb.commands.records import DetachedServer, Preview, ServerUp
from nqnb.commands.values import FilePath, queue_name
from nqnb.concurrency import first_of
from nqnb.errors import DevServerError, NqnbError
from nqnb.server import detached
from nqnb.server.detached import Condition, Detached
from nqnb.server.devserver import DevServer

_LOOK = 0.5
"""Seconds between looks at whether the server still runs."""
_PORT = 4222


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
    help="0: any  [4222; with --detach: any]",
    show_default=False,
)
@click.option(
    "--store-dir",
    type=FilePath(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the tasks are kept; default a folder of yours for that port",
)
@click.option(
    "go_queues",
    "--go-queue",
    type=queue_name,
    multiple=True,
    metavar="QUEUE",
    help="Let unpatched Go workers find the cancels of this queue; repeatable",
)
@click.option("--detach", is_flag=True, help="Run it in the background; every command then finds it")
@click.option("--status", is_flag=True, help="Show the server in the background; exit code 0: it runs")
@click.option("stops", "--stop", is_flag=True, help="Stop it; its tasks are kept")
@click.option("--yes", "-y", is_flag=True, help="With --stop: do not ask, whatever is queued or runs")
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
    """Run a nats-server here until Ctrl-C.

    It has JetStream, listens on 127.0.0.1 only, and comes with nqnb: nothing needs to be installed.

    With --detach it outlives this shell: one a user, with a token that only files of yours hold. Commands and
    notebooks that name no server find it, after NATS_URL and a context of the NATS CLI.
    """
    mode = one_of(detach=detach, status=status, stop=stops)
    if mode in ("stop", "status") and (port is not None or store_dir is not None or go_queues):
        raise click.UsageError(f"--{mode} is about the server that runs: leave the other options out")
    if mode == "status":
        return _status()
    if mode == "stop":
        return stop(ctx, yes)
    if mode == "detach":
        return _detach(ctx, port, store_dir, go_queues)
    _serve(ctx, _PORT if port is None else port, store_dir, go_queues)
    return None


def _serve(ctx: click.Context, port: int, store_dir: Path | None, go_queues: tuple[str, ...]) -> None:
    front = front_of(ctx)
    # Two servers must never share a store, hence a folder for each port.
    if store_dir is None and port:
        store_dir = Path(platformdirs.user_data_dir("nqnb", appauthor=False), f"server-{port}")

    async def serve() -> None:
        async with front.stop_requested() as stop, DevServer(port, store_dir, go_queues) as server:
            front.show(ServerUp(server.url, server.store_dir, server.version, server.pid))
            while server.running and not stop.is_set():
                await first_of(stop, timeout=_LOOK)
            if not stop.is_set():
                raise DevServerError(f"the nats-server at {server.url} ended by itself; start it again with `nqnb up`")

    front.run(serve)


def _detach(ctx: click.Context, port: int | None, store_dir: Path | None, go_queues: tuple[str, ...]) -> DetachedServer:
    server, new = detached.start(port or 0, store_dir, go_queues)
    if new:
        return _record("running", "Your detached server runs until `nqnb up --stop`", server)
    if (port and port != server.port) or store_dir is not None or go_queues:
        front_of(ctx).say("nqnb: it was left as it is; to start it otherwise, stop it first with `nqnb up --stop`")
    return _record("running", "Your detached server runs already", server)


def _status() -> DetachedServer:
    found = detached.look()
    if found.condition is Condition.RUNNING:
        return _record("running", "Your detached server runs", found.server)
    note = f"{found.problem[:1].upper()}{found.problem[1:]}" or "No detached server runs; `nqnb up --detach` starts one"
    return _record(found.condition.value, note, found.server, ok=False)


def stop(ctx: click.Context, yes: bool, before: Callable[[], None] = lambda: None) -> DetachedServer:
    """Stop the detached server, once it was said what is queued or runs there, and that was confirmed.

    Args:
        ctx: the command's.
        yes: the answer was given with the command.
        before: called when it is settled that the server stops, just before it does.

    Raises:
        NqnbError: the answer is no, or (`NeedsYes`) there is nobody to ask.
    """
    front = front_of(ctx)
    found = detached.look()
    if found.condition in (Condition.RUNNING, Condition.SILENT) and found.server is not None:
        question = _question(ctx, found.server, found.problem)
        if question and not yes and not front.confirm(f"{question} Stop it?"):
            raise NqnbError("it was not stopped, as that was not confirmed")
    before()
    stopped = detached.stop()
    if stopped is None:
        gone = found.condition is Condition.STALE
        return _record("none", f"No detached server runs{'; what a dead one had left is removed' if gone else ''}")
    return _record("stopped", "Your detached server is stopped; its tasks are kept", stopped)


def _question(ctx: click.Context, server: Detached, problem: str) -> str:
    """What a person should know before the server is stopped; nothing where nobody would miss it."""
    front = front_of(ctx)

    async def open_tasks() -> Preview:
        async with connect(server.url, token=server.token) as nq:
            return Preview.of(await nq.tasks(status=OPEN))

    try:
        if problem:
            raise DevServerError(problem)
        preview = front.run(open_tasks)
    except NqnbError as error:
        return f"{error}, so what is queued there is not known."
    if not preview.ids:
        return ""
    if not front.json:
        front.show(preview)
    count = "1 task is" if len(preview.ids) == 1 else f"{len(preview.ids):,} tasks are"
    return f"{count} queued or running there; all stay in its store until it is started again."


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
