"""The notebook's front door to the commands: they run on the session's loop, and show what they show in the cell."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import click

from nqnb.cli.render import as_text
from nqnb.client import Client, connect
from nqnb.errors import ConnectionFailed
from nqnb.notebook import sessions
from nqnb.notebook.asking import confirm
from nqnb.notebook.failures import in_a_cell
from nqnb.notebook.live import Live
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.server.server_choice import choose
from nqnb.text import clean, line

T = TypeVar("T")

_OF_THE_CONNECTION = {"connect_timeout", "name", "request_timeout", "retry_for"}
"""Settings that do not say which server is meant, so that a session that is open will do."""


class Notebook:
    """The front door; see `nqnb.commands.command.Front`.

    Args:
        shell: the IPython shell that the cell runs in.
        cell: the rest of the cell, of a ``%%nq``.

    Attributes:
        into: the name under which the result is kept (``-o``).
        quiet: whether nothing is shown but errors (``-q``).
        used: the session that the command has used.
    """

    def __init__(self, shell: Any, cell: str | None = None) -> None:
        self.json = False
        self.verbose = False
        self.into = ""
        self.quiet = False
        self.used: Session | None = None
        self.shell = shell
        self.cell = cell
        self._kernel = getattr(shell, "kernel", None)
        self._live: Live | None = None
        self._waits_for = ""

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """See `nqnb.commands.command.Front.run`: on nqnb's own loop; the stop button interrupts it."""
        return LOOP.call(work(), None if self._live is None else self._live.draw)

    def session(self, options: dict[str, Any]) -> Session:
        """The session that is meant; opened, if need be, as `nqnb.session` does.

        One that was named with a single command is not what is meant from then on.
        """
        known = sessions.current()
        if known is not None and not options.keys() - _OF_THE_CONNECTION:
            self.used = known
            return known
        self.used = found = sessions.beside(**options)
        if self.verbose or known is None:
            self.say(f"server {', '.join(found.settings.urls)}: {found.why}")
        return found

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """See `nqnb.commands.command.Front.client`: that of a session."""
        return contextlib.nullcontext(self.session(options).client)

    def stdin(self) -> bytes:
        """See `nqnb.commands.command.Front.stdin`: the cell, without its last line's end."""
        if self.cell is None:
            raise click.UsageError("a line has no stdin: write %%nq submit, and what is to come in below it")
        return self.cell.removesuffix("\n").encode("utf-8", "surrogatepass")

    def say(self, text: str) -> None:
        """See `nqnb.commands.command.Front.say`."""
        if not (self.json or self.quiet):
            print(clean(in_a_cell(text)), flush=True)  # noqa: T201  the cell's output

    def waits_for(self, task_id: str) -> None:
        """See `nqnb.commands.command.Front.waits_for`."""
        self._waits_for = task_id

    def interrupted(self) -> str:
        """Deal with an interrupt as the session's calls do: say what goes on, or cancel it.

        Returns:
            The end of the sentence that says that the command was interrupted.
        """
        if self._waits_for and self.used is not None and self.used.open:
            self.used.interrupt([self._waits_for])
            return ""
        reached = self._live.reached() if self._live is not None else ""
        return f"{reached}; what was asked for before goes on"

    def complain(self, text: str) -> None:
        """Say on stderr what went wrong beside the result."""
        print(f"nqnb: {line(in_a_cell(text))}", file=sys.stderr, flush=True)  # noqa: T201  as above

    def confirm(self, question: str) -> bool:
        """See `nqnb.commands.command.Front.confirm`."""
        return confirm(question, self._kernel)

    def show(self, record: object) -> None:
        """See `nqnb.commands.command.Front.show`."""
        self.say(as_text(record))

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[object], None]]:
        """See `nqnb.commands.command.Front.live`."""
        if self.json or self.quiet:
            yield lambda _: None
            return
        self._live = live = Live(self._kernel)
        try:
            yield live.show
        finally:
            live.draw(over=True)
        self._live = None

    follow = live

    @contextlib.asynccontextmanager
    async def stop_requested(self) -> AsyncIterator[asyncio.Event]:
        """See `nqnb.commands.command.Front.stop_requested`: the stop button cancels `run` instead."""
        yield asyncio.Event()

    def start_logging(self) -> None:
        """See `nqnb.commands.command.Front.start_logging`: a session keeps the log, see `nqnb.notebook.log`."""


class Completing(Notebook):
    """The front door while somebody presses Tab: it opens no session, starts no server, and asks nobody."""

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """See `nqnb.commands.command.Front.client`.

        Raises:
            ConnectionFailed: the session's server is away, or none was named.
        """
        known = sessions.current()
        if known is not None and not options.keys() - _OF_THE_CONNECTION:
            if not known.connected:
                raise ConnectionFailed("the server is away")
            return contextlib.nullcontext(known.client)
        choice = choose(patient=False, **options)
        if not choice.named:
            raise ConnectionFailed("no server was named")
        return connect(choice.settings)
