"""The shell's front end, which prints tables to a terminal, plain columns to a pipe, and JSON with ``--json``."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import IO, TYPE_CHECKING, Any, TextIO, TypeVar

import click

from nqnb.cli.streams import is_terminal
from nqnb.client import Client, connect
from nqnb.commands.command import NeedsYes, NewLoop
from nqnb.commands.command_records import CommandProgress, Value
from nqnb.commands.worker_commands import UserCodeError
from nqnb.errors import DevServerError, NoServer, NqnbError
from nqnb.log_format import JsonFormatter
from nqnb.server.server_choice import choose
from nqnb.text import clean, error_fields, line, plain, to_json

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("nqnb")

T = TypeVar("T")

_PIPE_WIDTH = 100_000
"""The width of tables that are not printed to a terminal. No line is this long, so no line is clipped or wrapped."""


class Interrupted(NqnbError):
    """The user interrupted a command. ``.task_id`` is the id of the task that it was waiting for, or None."""

    def __init__(self, message: str, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class Shell:
    """The front end for a shell; see `nqnb.commands.command.Front`."""

    def __init__(self) -> None:
        self.json = False
        self.verbose = False
        self._waits_for = ""
        self._logs_json = False

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], new_loop: NewLoop | None = None) -> T:
        """See `nqnb.commands.command.Front.run`."""
        if sys.version_info < (3, 11):
            # In Python 3.10, asyncio raises KeyboardInterrupt at any point. anyio cancels the work, as 3.11 does.
            import anyio

            try:
                return anyio.run(work, backend_options={"loop_factory": new_loop})
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(work())

    @contextlib.asynccontextmanager
    async def client(self, options: dict[str, Any]) -> AsyncIterator[Client]:
        """See `nqnb.commands.command.Front.client`. The server is chosen by `nqnb.server.server_choice.choose`."""
        choice = choose(**options)
        if self.verbose:
            self.say(f"server {', '.join(choice.settings.urls)}: the address is {choice.source}")
        try:
            nq = await connect(choice.settings).open()
        except NoServer as error:
            raise choice.explained(error) from error
        async with nq:
            yield nq

    def stdin(self, what: str, instead: str) -> bytes:
        """See `nqnb.commands.command.Front.stdin`."""
        if sys.stdin is None:
            raise click.UsageError(f"{what} cannot be read: stdin is closed. {instead}")
        return sys.stdin.buffer.read()

    def say(self, text: str) -> None:
        """See `nqnb.commands.command.Front.say`."""
        if not self.json:
            print(clean(text), file=sys.stderr, flush=True)

    def waits_for(self, task_id: str) -> None:
        """See `nqnb.commands.command.Front.waits_for`."""
        self._waits_for = task_id

    def interrupted(self, said: str) -> None:
        """Print ``said``. If ``said`` is empty, report which task the interrupted command was waiting for."""
        if self._waits_for and not said:
            said = f"interrupted; task {self._waits_for!r} continues. `nqnb cancel {self._waits_for}` stops it"
        if said:
            self.complain(Interrupted(said, self._waits_for or None))

    def complain(self, error: Exception, text: str = "") -> None:
        """Print an error to stderr."""
        if self.json:
            print(_json(error_fields(error), sys.stderr), file=sys.stderr)
            return
        text = text or str(error)
        if self._logs_json:
            log.error("%s", line(text), exc_info=error.__cause__ if isinstance(error, UserCodeError) else None)
            return
        if isinstance(error, UserCodeError):
            print(clean(error.traceback), file=sys.stderr)
        # A server error ends with log lines, which must remain separate lines.
        print(f"nqnb: {clean(text) if isinstance(error, DevServerError) else line(text)}", file=sys.stderr)

    def confirm(self, question: str) -> bool:
        """See `nqnb.commands.command.Front.confirm`."""
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise NeedsYes(f"cannot ask for confirmation: there is no terminal. Add --yes to answer yes to: {question}")
        return click.confirm(clean(question), err=True)

    def show(self, record: object) -> None:
        """See `nqnb.commands.command.Front.show`."""
        if self.json and not isinstance(record, str):
            form = record.as_json() if hasattr(record, "as_json") else plain(record)
            print(_json(form, sys.stdout, 2 if sys.stdout.isatty() else None), flush=True)
            return
        if isinstance(record, Value):
            print(_json(record.value, sys.stdout, 2), flush=True)
            return
        # rich takes 50 ms to import, and JSON does not need it.
        from nqnb.cli.render import render

        shown = render(record)
        console = _console(sys.stdout)
        if console.is_terminal and not isinstance(shown, str):
            console.print(shown)
            return
        if not isinstance(shown, str):
            with console.capture() as captured:
                console.print(shown)
            shown = "\n".join(each.rstrip() for each in captured.get().splitlines())
        if shown:
            print(shown, flush=True)

    @contextlib.contextmanager
    def live(self, *, transient: bool = False) -> Iterator[Callable[[object], None]]:
        """See `nqnb.commands.command.Front.live`. If stderr cannot be redrawn, only the last record is shown."""
        if self.json:
            yield lambda _: None
            return
        if not _can_redraw(sys.stderr):
            states: deque[object] = deque(maxlen=1)
            yield states.append
            for state in states:
                if not (isinstance(state, CommandProgress) or getattr(state, "transient", False)):
                    self.show(state)
            return
        from rich.live import Live

        from nqnb.cli.render import render

        with Live(console=_console(sys.stderr), refresh_per_second=8, transient=transient) as live:
            yield lambda record: live.update(render(record))

    @contextlib.contextmanager
    def follow(self) -> Iterator[Callable[[Any], None]]:
        """See `nqnb.commands.command.Front.follow`. The full screen is used only if stdout can be redrawn."""
        if self.json:
            yield lambda record: print(_json(record.as_json(), sys.stdout), flush=True)
            return
        if not _can_redraw(sys.stdout):
            seen = False

            def show_news(record: Any) -> None:
                nonlocal seen
                self.show(record.news if seen and hasattr(record, "news") else record)
                seen = True

            yield show_news
            return
        from rich.live import Live

        from nqnb.cli.render import render

        last: deque[object] = deque(maxlen=1)

        def update(record: object) -> None:
            last.append(record)
            live.update(render(record))

        console = _console(sys.stdout)
        with Live(console=console, screen=True, refresh_per_second=4, vertical_overflow="crop") as live:
            yield update
        for record in last:
            self.show(record)

    @contextlib.asynccontextmanager
    async def stop_requested(self) -> AsyncIterator[asyncio.Event]:
        """See `nqnb.commands.command.Front.stop_requested`. SIGINT and SIGTERM set the event."""
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

    def start_logging(self, *, json: bool = False) -> None:
        """See `nqnb.commands.command.Front.start_logging`. An existing logging configuration is not changed."""
        self._logs_json = json
        if logging.getLogger().handlers:
            return
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        if json:
            handler.setFormatter(JsonFormatter())
            logging.basicConfig(level=logging.INFO, handlers=[handler])
            return
        form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        if sys.stderr.isatty():
            from rich.logging import RichHandler

            handler = RichHandler(console=_console(sys.stderr), show_path=False, markup=False, log_time_format="%X")
            form = "%(message)s"
        handler.setFormatter(_CleanFormatter(form))
        logging.basicConfig(level=logging.INFO, handlers=[handler])


class _CleanFormatter(logging.Formatter):
    """A log formatter that escapes control characters, because log records may contain text from a queue."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def _json(value: object, stream: TextIO, indent: int | None = None) -> str:
    """Return a value as JSON that can be written to a stream.

    Non-ASCII characters are escaped unless the stream's encoding is UTF-8, because other encodings lack some of them.
    """
    is_utf8 = codecs.lookup(stream.encoding or "utf-8").name == "utf-8"
    return to_json(value, indent=indent, only_ascii=not is_utf8)


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(
        file=stream,
        # Otherwise, FORCE_COLOR and TTY_COMPATIBLE would put colour codes into pipes.
        force_terminal=stream.isatty(),
        width=None if stream.isatty() else _PIPE_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )


def _can_redraw(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can overwrite text, unlike those of some editors and CI systems."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
