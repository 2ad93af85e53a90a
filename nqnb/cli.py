"""The shell's front door to the commands: tables on a terminal, plain columns in a pipe, JSON, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from nqnb.cli_text import clean, error_fields, line, plain, to_json
from nqnb.client import Client, connect
from nqnb.commands import tree
from nqnb.errors import BadInput, ConnectionFailed, DevServerError, NqnbError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

DONE, REFUSED, USAGE, NO_CONNECTION = range(4)
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 141
"""What a shell reports of a program that wrote into a closed pipe."""

_PLAIN_WIDTH = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: default those of this process.

    Returns:
        The exit code: 0 done, 1 refused, 2 usage, 3 no connection, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A narrow encoding must not turn a result into a traceback.
            stream.reconfigure(errors="replace")
    shell = Shell()
    try:
        code = _run(shell, arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _run(shell: Shell, arguments: Sequence[str] | None) -> int:
    try:
        record = tree.main(arguments, prog_name="nqnb", obj=shell, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        shell.complain(error, _usage(error))
        return USAGE
    except NqnbError as error:
        shell.complain(error)
        return exit_code(error)
    if isinstance(record, int):  # --help and --version have spoken for themselves
        return record
    if record is not None:
        shell.show(record)
        for each in getattr(record, "errors", ()):
            shell.complain(each)
    return DONE if getattr(record, "ok", True) else REFUSED


def exit_code(error: NqnbError) -> int:
    """The exit code that says what kind of error it was."""
    if isinstance(error, ConnectionFailed):
        return NO_CONNECTION
    return USAGE if isinstance(error, BadInput) else REFUSED


class Shell:
    """The front door; see `nqnb.commands.Front`."""

    def __init__(self) -> None:
        self.json = False

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """See `nqnb.commands.Front.run`."""
        return asyncio.run(work())

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """See `nqnb.commands.Front.client`."""
        return connect(None, **options)

    def say(self, text: str) -> None:
        """See `nqnb.commands.Front.say`."""
        if not self.json:
            print(clean(text), file=sys.stderr, flush=True)  # noqa: T201

    def complain(self, error: Exception, text: str = "") -> None:
        """Say on stderr what went wrong, in one line."""
        if self.json:
            print(to_json(error_fields(error)), file=sys.stderr)  # noqa: T201
            return
        text = text or str(error)
        if (trace := getattr(error, "traceback", None)) and not getattr(error, "task_id", None):
            print(clean(trace), file=sys.stderr)  # noqa: T201
        # The end of the server's log is worth its lines.
        print(f"nqnb: {clean(text) if isinstance(error, DevServerError) else line(text)}", file=sys.stderr)  # noqa: T201

    def show(self, record: object) -> None:
        """See `nqnb.commands.Front.show`."""
        if self.json:
            text = to_json(_json_form(record), indent=2 if sys.stdout.isatty() else None)
        elif isinstance(record, str):
            text = record
        else:
            # rich takes 50 ms to import, which JSON need not wait for.
            from nqnb.show import show

            console = _console(sys.stdout)
            if console.is_terminal:
                console.print(show(record))
                return
            with console.capture() as captured:
                console.print(show(record))
            text = "\n".join(each.rstrip() for each in captured.get().splitlines())
        print(text, flush=True)  # noqa: T201

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[object], None]]:
        """See `nqnb.commands.Front.live`; where nobody watches, only a last state that is more than a number shows."""
        if self.json or not sys.stderr.isatty():
            yield lambda _: None
            return
        from rich.live import Live

        from nqnb.show import show

        with Live(console=_console(sys.stderr), refresh_per_second=8) as live:
            yield lambda record: live.update(show(record))

    @contextlib.asynccontextmanager
    async def stop_requested(self) -> AsyncIterator[asyncio.Event]:
        """See `nqnb.commands.Front.stop_requested`: SIGINT and SIGTERM."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        former = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each in former:
            signal.signal(each, lambda *_: loop.call_soon_threadsafe(stop.set))
        try:
            yield stop
        finally:
            for each, handler in former.items():
                signal.signal(each, handler)

    def start_logging(self) -> None:
        """See `nqnb.commands.Front.start_logging`; a program that has set up its own is left alone."""
        if logging.getLogger().handlers:
            return
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        if sys.stderr.isatty():
            from rich.logging import RichHandler

            handler = RichHandler(console=_console(sys.stderr), show_path=False, markup=False, log_time_format="%X")
            form = "%(message)s"
        handler.setFormatter(_CleanFormatter(form))
        logging.basicConfig(level=logging.INFO, handlers=[handler])


class _CleanFormatter(logging.Formatter):
    """Log records may quote what came from a queue."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def _json_form(record: object) -> Any:
    """What stands for a record in JSON; where its fields are not the answer to what was asked, the answer."""
    return getattr(record, "as_json", lambda: plain(record))()


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f"; see `{context.command_path} -h`" if context is not None else ""
    return f"{error.format_message().rstrip('.')}{hint}"


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(
        file=stream,
        width=None if stream.isatty() else _PLAIN_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )
