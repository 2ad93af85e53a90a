"""The front end for commands in a notebook: connections, questions, output and errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import click
from IPython.core.error import StdinNotImplementedError

from nqnb.cli import usage
from nqnb.cli.render import as_text
from nqnb.client import Client, connect
from nqnb.commands.command import NeedsYes, NewLoop
from nqnb.errors import BadInput, ConnectionFailed, DevServerError
from nqnb.notebook import session_registry
from nqnb.notebook.live_output import CommandOutput
from nqnb.notebook.loop import LOOP
from nqnb.notebook.session import Session
from nqnb.notebook.tracebacks import HiddenFrames, replace_traceback
from nqnb.notebook.wait_line import WaitLine
from nqnb.server.server_choice import choose
from nqnb.text import clean, line

T = TypeVar("T")

_CONNECTION_OPTIONS = {"connect_timeout", "name", "request_timeout", "retry_for"}
"""Settings that do not name a server. An open session can be used even if a command passes these settings."""
_QUEUED_CELLS_MILLISECONDS = 300
"""How long to wait for more cells from Run All before asking a question."""
_CELL_WORDS = (
    (re.compile("`nqnb up --stop`"), "`%nq down --server`"),
    (re.compile("`nqnb up --detach`"), "`%nq up`"),
    (re.compile("`nqnb (?!up --)"), "`%nq "),  # `%nq up` does not have the other options of `nqnb up`
)
"""Patterns for the command lines in messages, and the equivalent magics."""


class NotebookFront:
    """A `nqnb.commands.command.Front` that runs commands on nqnb's loop and shows their output in the cell.

    Args:
        shell: the IPython shell that the cell runs in.
        cell: the body of the cell for ``%%nq``, or None for ``%nq``.

    Attributes:
        into: the name of the variable to which the result is assigned (``-o``).
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

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], new_loop: NewLoop | None = None) -> T:
        """Run the coroutine of a command on nqnb's own loop. The notebook's stop button interrupts the coroutine."""
        with contextlib.ExitStack() as lines:
            line: WaitLine | None = None

            def draw() -> None:
                nonlocal line
                if self._progress is not None:
                    self._progress.draw()
                if self._awaited_id and self.used is not None and not (self.json or self.quiet):
                    if line is None:
                        line = lines.enter_context(WaitLine(self.used.client, lambda: [self._awaited_id], 1))
                    line.draw()

            return LOOP.call(work(), draw)

    def session(self, options: dict[str, Any]) -> Session:
        """Return the session for a command. If necessary, open the session as `nqnb.session` does.

        If the command names a server, later commands do not use that server by default.
        """
        known = session_registry.current()
        if known is not None and not options.keys() - _CONNECTION_OPTIONS:
            self.used = known
            return known
        self.used = found = session_registry.find_or_open(**options)
        if self.verbose or known is None:
            self.say(f"connected to {found.where}")
        return found

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """Return the client of the session for a command."""
        return contextlib.nullcontext(self.session(options).client)

    def stdin(self, what: str, instead: str) -> bytes:
        """Return the body of the cell, without the trailing newline."""
        if self.cell is None:
            raise click.UsageError(
                f"a line magic has no stdin. Use the cell magic %%nq, and put {what} below its first line."
            )
        return self.cell.removesuffix("\n").encode("utf-8", "surrogatepass")

    def say(self, text: str) -> None:
        """Print a message in the cell."""
        if not (self.json or self.quiet):
            print(clean(as_cell_text(text)), flush=True)  # noqa: T201  the cell's output

    def waits_for(self, task_id: str) -> None:
        """Record the task that the command waits for, so that an interrupt can report or cancel the task."""
        self._awaited_id = task_id

    def interrupted(self) -> str:
        """Handle an interrupt in the same way as session calls: report or cancel the awaited task, unless it has ended.

        Returns:
            The end of the message that reports the interrupt.
        """
        if self._awaited_id and self.used is not None and self.used.open:
            self.used.interrupt([self._awaited_id])
            return ""
        reached = self._progress.reached() if self._progress is not None else ""
        return f"{reached}; requests that were already sent still take effect"

    def complain(self, text: str) -> None:
        """Print an error to stderr. Call this method for errors that the result does not contain."""
        print(f"nqnb: {line(as_cell_text(text))}", file=sys.stderr, flush=True)  # noqa: T201  the cell's output

    def confirm(self, question: str) -> bool:
        """Ask the user a question, and return whether the answer is yes."""
        return confirm(question, self._kernel)

    def show(self, record: object) -> None:
        """Print a record in the cell."""
        self.say(as_text(record))

    @contextlib.contextmanager
    def live(self, *, transient: bool = False) -> Iterator[Callable[[object], None]]:
        """See `nqnb.commands.command.Front.live`. The progress is shown below the cell."""
        if self.json or self.quiet:
            yield lambda _: None
            return
        self._progress = progress = CommandOutput(self._kernel)
        try:
            yield progress.show
        finally:
            progress.clear() if transient else progress.draw(finished=True)
        self._progress = None

    follow = live

    @contextlib.asynccontextmanager
    async def stop_requested(self) -> AsyncIterator[asyncio.Event]:
        """Provide an event that is never set. The notebook's stop button cancels `run` instead."""
        yield asyncio.Event()

    def start_logging(self, *, json: bool = False) -> None:
        """Do nothing, because the session stores the log; see `Session.log`."""


class CompletionFront(NotebookFront):
    """The front end for Tab completion. This front end does not open sessions, start servers or ask questions."""

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """Return the client of the open session, or a client for the server that the line names.

        Raises:
            ConnectionFailed: the session is not connected, or there is no open session and no server is configured.
        """
        known = session_registry.current()
        if known is not None and not options.keys() - _CONNECTION_OPTIONS:
            if not known.connected:
                raise ConnectionFailed(
                    "Tab completion failed: the session is not connected. Try again when the session has reconnected."
                )
            return contextlib.nullcontext(known.client)
        choice = choose(patient=False, **options)
        if not choice.named:
            raise ConnectionFailed(
                "Tab completion failed: there is no open session, and no server is configured. Connect with `%nq up`."
            )
        return connect(choice.settings)


def confirm(question: str, kernel: Any) -> bool:
    """Ask the user a question, and return whether the answer is yes.

    Programs that run a notebook without a user, such as nbclient and papermill, tell the kernel that stdin is not
    available. Run All sends all cells at once, and a question would delay all cells after this cell. The user is
    therefore asked only if no other cells are queued, for example in the last cell of a Run All.

    Args:
        question: the text of the question, without the prompt ``[y/N]``.
        kernel: the kernel that the cell runs in, or None in a terminal.

    Raises:
        NeedsYes: the user cannot be asked.
    """
    if kernel is None and not (sys.stdin and sys.stdin.isatty()):
        raise NeedsYes(f"cannot ask for confirmation: stdin is not a terminal. Add --yes to answer yes to: {question}")
    if kernel is not None and cells_are_waiting(kernel):
        raise NeedsYes(
            "cannot ask for confirmation: other cells are queued, for example by Run All. "
            f"Run this cell alone, or add --yes to answer yes to: {question}"
        )
    try:
        answer = input(f"{clean(question)} [y/N]: ")
    except StdinNotImplementedError:
        raise NeedsYes(
            "cannot ask for confirmation: this notebook is not running interactively. "
            f"Add --yes to answer yes to: {question}"
        ) from None
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def cells_are_waiting(kernel: Any) -> bool:
    """Return whether other cells are queued after the running cell, or False if this cannot be determined."""
    stream = _request_stream(kernel)
    check_again = getattr(stream, "_handle_events", None)
    if stream is None or check_again is None:
        return False
    waiting = bool(stream.socket.poll(_QUEUED_CELLS_MILLISECONDS))
    # Polling consumes the notification that the stream itself waits for.
    stream.io_loop.add_callback(check_again, stream.socket, 0)
    return waiting


def _request_stream(kernel: Any) -> Any:
    """Return the stream of requests to the main thread. ipykernel 6 and 7 have no public name for this stream."""
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is None:
        return getattr(kernel, "shell_stream", None)
    pair = getattr(getattr(thread, "manager", None), "_shell_channel_to_main", None)
    return getattr(pair, "to_stream", None)


def as_cell_text(text: str) -> str:
    """Replace the command lines in a message with the equivalent magics."""
    for command_line, magic in _CELL_WORDS:
        text = command_line.sub(magic, text)
    return text


def one_line_error(error: BaseException, interrupted: Callable[[], str], hint: str = "") -> BaseException:
    """Return the error to raise in the cell. IPython shows this error on one line.

    Args:
        error: the error of a command. An error from click is converted to `BadInput`.
        interrupted: a function that is called after an interrupt and returns the end of the message for the user.
        hint: a sentence to show after the error.
    """
    if not isinstance(vars(error).get("_render_traceback_", HiddenFrames(error)), HiddenFrames):
        return error  # an error in the user's code, whose traceback shows the line in the cell
    if isinstance(error, click.ClickException):
        text = usage(error)
        error = BadInput(f"{text.rstrip('.')}. {hint}" if hint else text)
    elif isinstance(error, KeyboardInterrupt):
        text = as_cell_text(str(error)) or f"interrupted{interrupted()}"
    else:
        text = as_cell_text(str(error))
    text = f"{text.rstrip('.')}. {hint}" if hint else text
    # A DevServerError may quote the end of a server's log, which has several lines.
    shown = clean(text) if isinstance(error, DevServerError) else line(text)
    replace_traceback(error, lambda: [f"nqnb: {shown}"])
    return error
