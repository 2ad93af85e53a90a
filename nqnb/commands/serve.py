"""`nqnb worker`: run the tasks of some queues."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import click

from nqnb.commands.crew import Crew, Membership
from nqnb.commands.options import Command, front_of, options_of
from nqnb.errors import NqnbError
from nqnb.server.server_choice import choose
from nqnb.settings import Settings
from nqnb.worker.worker import Worker

log = logging.getLogger("nqnb.worker")


class UserCodeError(NqnbError):
    """The module that was to be served cannot be imported; ``.traceback`` shows where, within that code."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb worker mymodule:worker
  nqnb worker app.tasks:worker --concurrency 16
  nqnb worker app.tasks:worker --processes 4
""",
)
@click.argument("target", metavar="MODULE:WORKER")
@click.option("--concurrency", type=click.IntRange(1), metavar="N", help="Tasks at once, in place of the worker's own")
@click.option(
    "--processes", type=click.IntRange(1), metavar="N", help="N processes that serve the same, each with its own slots"
)
@click.option("--member", is_flag=True, hidden=True)
@click.pass_context
def worker(ctx: click.Context, target: str, concurrency: int | None, processes: int | None, member: bool) -> None:
    """Run the tasks of some queues.

    MODULE is imported as Python would from the current folder; WORKER is the name of an nqnb.Worker in it. SIGINT
    (Ctrl-C) or SIGTERM stops it: what runs may end, for as long as the worker's shutdown_timeout; a second one does
    not wait.

    One process uses about one core, as long as its handlers are coroutines or threads: with --processes there are
    several, each with the worker's own concurrency. One that crashes is replaced, and the signals are passed on to all
    of them; the exit code is the worst of theirs.
    """
    front = front_of(ctx)
    front.start_logging()
    options = options_of(ctx)
    membership = Membership() if member else None
    if membership is not None:
        options = {**options, **membership.options}
    found = _find(target)
    if processes is not None:
        ctx.exit(front.run(_crew(found, target, concurrency, front.json, options, processes).run))
    found.settings = _settings(found.settings, options)
    if concurrency is not None:
        found.concurrency = concurrency
    front.run(found.serve if membership is None else lambda: membership.serve(found))


def _crew(found: Worker, target: str, concurrency: int | None, json: bool, options: dict[str, Any], size: int) -> Crew:
    if sys.platform == "win32":
        raise click.UsageError("--processes needs POSIX signals, which Windows has not; start several workers instead")
    given = [
        target,
        *(() if concurrency is None else ("--concurrency", f"{concurrency}")),
        *(["--json"] if json else []),
    ]
    return Crew(given, options, size, found.shutdown_timeout)


def _settings(own: Settings, options: dict[str, Any]) -> Settings:
    """The worker's settings, with what was given; one that names no server gets the one that every command gets."""
    nameless = not own.named and not any((own.user, own.token, own.creds, own.nkey, own.tls_ca, own.context))
    if nameless and (choice := choose(**options)).detached:
        log.info("no server was named, so the worker serves your detached server at %s", choice.settings.url)
        options = {**options, "url": choice.settings.url, "token": choice.settings.token}
    return Settings.of(own, **options)


def _find(target: str) -> Worker:
    name, _, path = target.partition(":")
    if not name or not path or name.endswith(".py") or "/" in name:
        example = Path(name).name.removesuffix(".py") or "mymodule"
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
