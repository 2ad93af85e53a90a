"""`nqnb up` and `nqnb worker`: what runs until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click
import platformdirs

from nqnb.commands.options import Command, front_of, options_of
from nqnb.commands.records import ServerUp
from nqnb.devserver import DevServer
from nqnb.errors import DevServerError, NqnbError
from nqnb.settings import Settings
from nqnb.worker.worker import Worker

_LOOK = 0.5
"""Seconds between looks at whether the server still runs."""


class UserCodeError(NqnbError):
    """The module that was to be served cannot be imported; ``.traceback`` shows where, within that code."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb up
  nqnb up --port 4333 --store-dir ./jetstream
""",
)
@click.option("--port", type=click.IntRange(0, 65535), default=4222, metavar="PORT", show_default=True, help="0: any")
@click.option(
    "--store-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the tasks are kept; default a folder of yours for that port",
)
@click.pass_context
def up(ctx: click.Context, port: int, store_dir: Path | None) -> None:
    """Run a nats-server here until Ctrl-C.

    It has JetStream, listens on 127.0.0.1 only, and comes with nqnb: nothing needs to be installed.
    """
    front = front_of(ctx)
    # Two servers must never share a store, hence a folder for each port.
    if store_dir is None and port:
        store_dir = Path(platformdirs.user_data_dir("nqnb", appauthor=False), f"server-{port}")

    async def serve() -> None:
        async with front.stop_requested() as stop, DevServer(port, store_dir) as server:
            front.show(ServerUp(server.url, server.store_dir, server.version, server.pid))
            while server.running and not stop.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop.wait(), _LOOK)
            if not stop.is_set():
                raise DevServerError(f"the nats-server at {server.url} ended by itself; start it again with `nqnb up`")

    front.run(serve)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb worker mymodule:worker
  nqnb worker app.tasks:worker --concurrency 16
""",
)
@click.argument("target", metavar="MODULE:WORKER")
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Tasks at once, in place of the worker's own")
@click.pass_context
def worker(ctx: click.Context, target: str, concurrency: int | None) -> None:
    """Run the tasks of some queues.

    MODULE is imported as Python would from the current folder; WORKER is the name of an nqnb.Worker in it. SIGINT
    (Ctrl-C) or SIGTERM stops it: what runs may end, for as long as the worker's shutdown_timeout; a second one does
    not wait.
    """
    front = front_of(ctx)
    front.start_logging()
    found = _find(target)
    found.settings = Settings.of(found.settings, **options_of(ctx))
    if concurrency is not None:
        found.concurrency = concurrency
    front.run(found.serve)


def _find(target: str) -> Worker:
    name, _, path = target.partition(":")
    if not name or not path or name.endswith(".py") or "/" in name:
        example = Path(name).stem if name.endswith(".py") else name or "mymodule"
        raise click.UsageError(
            f"{target!r} names no worker: write MODULE:WORKER, like {example}:{path or 'worker'}, "
            "in the folder where the module is"
        )
    module = _import(name)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            there = ", ".join(f"{name}:{each}" for each, value in vars(module).items() if isinstance(value, Worker))
            raise click.UsageError(
                f"module {name!r} has no {path!r}" + (f"; there is {there}" if there else ", and no nqnb.Worker at all")
            )
        found = getattr(found, part)
    if not isinstance(found, Worker):
        raise click.UsageError(f"{target!r} is of type {type(found).__name__!r}; name an nqnb.Worker")
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
            f"there is no module {error.name!r} here, in {os.getcwd()!r}; go to its folder, or install it"
        ) from None
    except (Exception, SystemExit) as error:
        raise _user_error(name, error) from error


def _user_error(name: str, error: BaseException) -> UserCodeError:
    inner: TracebackType | None = error.__traceback__
    while inner is not None and inner.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("nqnb", "importlib"):
        inner = inner.tb_next
    text = "".join(traceback.format_exception(type(error), error, inner)).rstrip()
    return UserCodeError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}", text)
