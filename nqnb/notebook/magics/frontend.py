"""The notebook's front for the commands: how a command connects, asks, shows and fails in a cell."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import click
from IPython.core.error import StdinNotImplementedError

from nqnb.cli import usage
from nqnb.cli.render import as_text
from nqnb.client import Client, connect
from nqnb.commands.command import NeedsYes
from nqnb.errors import BadInput, ConnectionFailed, DevServerError
from nqnb.notebook import session_registry
from nqnb.notebook.live_output import CommandOutput
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.server.server_choice import choose
from nqnb.text import clean, line

T = TypeVar("T")

_CONNECTION_OPTIONS = {"connect_timeout", "name", "request_timeout", "retry_for"}
"""Settings that do not name a server, so that an open session can be used with them."""
_QUEUED_CELLS_MILLISECONDS = 300
"""How long to wait for the cells that Run All sends behind the one that asks."""
_CELL_WORDS = (("`nqnb up --stop`", "`%nq down --server`"), ("`nqnb up --detach`", "`%nq up`"), ("`nqnb ", "`%nq "))
"""Command lines, and the magics that do the same in a cell."""


class NotebookFront:
    """Runs commands on nqnb's loop, and shows in the cell what they show; implements `nqnb.commands.command.Front`.

    Args:
        shell: the IPython shell that the cell runs in.
        cell: the body of the cell, for ``%%nq``.

    Attributes:
        into: the name of the variable that receives the result (``-o``).
        quiet: whether only errors are shown (``-q``).
        used: the session that the command used.
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
        self._progress: CommandOutput | None = None
        self._awaited_id = ""

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a command's work on nqnb's own loop; the stop button interrupts it."""
        return LOOP.call(work(), None if self._progress is None else self._progress.draw)

    def session(self, options: dict[str, Any]) -> Session:
        """Return the session that a command uses; open it as `nqnb.session` does if necessary.

        A session that one command names does not become the session that later commands use.
        """
        known = session_registry.current()
        if known is not None and not options.keys() - _CONNECTION_OPTIONS:
            self.used = known
            return known
        self.used = found = session_registry.find_or_open(**options)
        if self.verbose or known is None:
            self.say(f"server {', '.join(found.settings.urls)}: {found.why}")
        return found

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """Return the client of the session that a command uses."""
        return contextlib.nullcontext(self.session(options).client)

    def stdin(self) -> bytes:
        """Return the body of the cell, without the end of its last line."""
        if self.cell is None:
            raise click.UsageError("a line magic has no stdin. Write %%nq submit, and the input below it.")
        return self.cell.removesuffix("\n").encode("utf-8", "surrogatepass")

    def say(self, text: str) -> None:
        """Print a message in the cell."""
        if not (self.json or self.quiet):
            print(clean(as_cell_text(text)), flush=True)  # noqa: T201  the cell's output

    def waits_for(self, task_id: str) -> None:
        """Note which task the command waits for; an interrupt reports it."""
        self._awaited_id = task_id

    def interrupted(self) -> str:
        """Handle an interrupt as the session's calls do: report the task that goes on, or cancel it.

        Returns:
            The end of the sentence that says that the command was interrupted.
        """
        if self._awaited_id and self.used is not None and self.used.open:
            self.used.interrupt([self._awaited_id])
            return ""
        reached = self._progress.reached() if self._progress is not None else ""
        return f"{reached}; requests that were already sent still take effect"

    def complain(self, text: str) -> None:
        """Print an error on stderr that the result does not contain."""
        print(f"nqnb: {line(as_cell_text(text))}", file=sys.stderr, flush=True)  # noqa: T201  the cell's output

    def confirm(self, question: str) -> bool:
        """Ask the user, and return whether the answer is yes."""
        return confirm(question, self._kernel)

    def show(self, record: object) -> None:
        """Print a record in the cell."""
        self.say(as_text(record))

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[object], None]]:
        """Give a function that shows the progress of the command below the cell."""
        if self.json or self.quiet:
            yield lambda _: None
            return
        self._progress = progress = CommandOutput(self._kernel)
        try:
            yield progress.show
        finally:
            progress.draw(finished=True)
        self._progress = None

    follow = live

    @contextlib.asynccontextmanager
    async def stop_requested(self) -> AsyncIterator[asyncio.Event]:
        """Give an event that is never set: the stop button cancels `run` instead."""
        yield asyncio.Event()

    def start_logging(self) -> None:
        """Do nothing: the session keeps the log; see `Session.log`."""


class CompletionFront(NotebookFront):
    """The front while the user presses Tab: it opens no session, starts no server, and asks no question."""

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """Return the client of the open session, or of the server that the line names.

        Raises:
            ConnectionFailed: the session's server is not connected, or the line names no server.
        """
        known = session_registry.current()
        if known is not None and not options.keys() - _CONNECTION_OPTIONS:
            if not known.connected:
                raise ConnectionFailed("cannot complete: the server is not connected. Complete again when it is back.")
            return contextlib.nullcontext(known.client)
        choice = choose(patient=False, **options)
        if not choice.named:
            raise ConnectionFailed("cannot complete: no server was named. Connect with `%nq up`.")
        return connect(choice.settings)


def confirm(question: str, kernel: Any) -> bool:
    """Ask the user a question, and return whether the answer is yes.

    Programs that run a notebook without a user (nbclient, papermill) tell the kernel that they take no questions. Run
    All sends all cells at once, so cells that wait behind this one are the sign of it. In the last cell of a Run All
    the user is asked.

    Args:
        question: the question.
        kernel: the kernel that the cell runs in; None in a terminal.

    Raises:
        NeedsYes: nobody can answer.
    """
    if kernel is None and not (sys.stdin and sys.stdin.isatty()):
        raise NeedsYes(f"{question} Cannot ask: stdin is not a terminal. Add --yes.")
    if kernel is not None and cells_are_waiting(kernel):
        raise NeedsYes(
            f"{question} Cannot ask: other cells wait behind this one, as in Run All. Add --yes, or run the cell alone."
        )
    try:
        answer = input(f"{clean(question)} [y/N]: ")
    except StdinNotImplementedError:
        raise NeedsYes(f"{question} Cannot ask: this notebook runs without a user. Add --yes.") from None
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def cells_are_waiting(kernel: Any) -> bool:
    """Whether cells wait behind the running one; False where the kernel does not tell."""
    stream = _request_stream(kernel)
    check_again = getattr(stream, "_handle_events", None)
    if stream is None or check_again is None:
        return False
    waiting = bool(stream.socket.poll(_QUEUED_CELLS_MILLISECONDS))
    # Polling consumes the stream's own notification.
    stream.io_loop.add_callback(check_again, stream.socket, 0)
    return waiting


def _request_stream(kernel: Any) -> Any:
    """Return the stream of requests to the main thread, in ipykernel 7 or 6. Neither has a public name for it."""
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is None:
        return getattr(kernel, "shell_stream", None)
    pair = getattr(getattr(thread, "manager", None), "_shell_channel_to_main", None)
    return getattr(pair, "to_stream", None)


def as_cell_text(text: str) -> str:
    """Return text with its command lines replaced by the magics that do the same."""
    for command_line, magic in _CELL_WORDS:
        text = text.replace(command_line, magic)
    return text


def replace_traceback(error: BaseException, render: Callable[[], list[str]]) -> None:
    """Make IPython show these lines in place of an error's traceback."""
    error._render_traceback_ = render  # type: ignore[attr-defined]  # the hook that IPython calls


def one_line_error(error: BaseException, interrupted: Callable[[], str]) -> BaseException:
    """Return the error to raise in the cell, which IPython shows as one line.

    Args:
        error: the error of a command; click's errors become `BadInput`.
        interrupted: called for an interrupt; returns the end of the sentence that reports it.
    """
    if hasattr(error, "_render_traceback_"):  # an error of the user's own code, which shows its place in the cell
        return error
    if isinstance(error, click.ClickException):
        text = usage(error)
        error = BadInput(text)
    elif isinstance(error, KeyboardInterrupt):
        text = f"interrupted{interrupted()}"
    else:
        text = as_cell_text(str(error))
    # The end of a server's log needs more than one line.
    shown = clean(text) if isinstance(error, DevServerError) else line(text)
    replace_traceback(error, lambda: [f"nqnb: {shown}"])
    return error
