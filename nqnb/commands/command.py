"""The parts that all commands share: the interface of the front end, the connection to the server, and the options.

The front end is either the shell (`nqnb.cli.shell`) or a notebook. Both run the same commands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, ClassVar, Protocol, TypeVar

import click

from nqnb.client import Client
from nqnb.commands.command_hints import no_such_command
from nqnb.commands.option_hints import no_such_option
from nqnb.commands.param_types import FilePath, seconds
from nqnb.commands.similar_ids import suggest_id
from nqnb.errors import NqnbError, UnknownTask
from nqnb.protocol.serving import unserved
from nqnb.records import TaskInfo

T = TypeVar("T")

_OPTIONS_KEY = "nqnb.options"
"""The key in ``ctx.meta`` under which the values of the shared options are stored."""
_UNSERVED_DELAY_SECONDS = 0.5
"""How long a command waits for a task before checking whether any worker is serving the task's queue."""


NewLoop = Callable[[], asyncio.AbstractEventLoop]
"""A function that creates an event loop."""


class NeedsYes(NqnbError):
    """A command cannot ask for confirmation, for example because there is no terminal."""


class Front(Protocol):
    """The interface through which a command communicates with the server and the user. ``ctx.obj`` implements it."""

    json: bool
    """Whether JSON output was requested."""
    verbose: bool
    """Whether to show which server was chosen and why."""

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], new_loop: NewLoop | None = None) -> T:
        """Run an async function to completion, and return its result.

        ``new_loop`` creates the event loop. If ``new_loop`` is None, asyncio's default event loop is used. A front end
        that already has an event loop ignores ``new_loop``.
        """
        ...

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """Return an async context manager that provides a connected client.

        A command calls this method outside `run`, and enters the context manager inside `run`. ``options`` contains the
        `nqnb.Settings` fields that the user set with the shared options.
        """
        ...

    def stdin(self, what: str, instead: str) -> bytes:
        """Return the contents of stdin.

        Args:
            what: the name of the input in the error message if stdin is unavailable, such as "the payload".
            instead: a sentence that tells the user how to pass the input without stdin.
        """
        ...

    def say(self, text: str) -> None:
        """Show a message to the user, in addition to the result."""
        ...

    def waits_for(self, task_id: str) -> None:
        """Record the id of the task that the command is about to wait for."""
        ...

    def confirm(self, question: str) -> bool:
        """Ask the user a question, and return whether the answer is yes.

        This method blocks, so it must be called outside `run`.

        Raises:
            NeedsYes: the user cannot be asked, for example because there is no terminal.
        """
        ...

    def show(self, record: object) -> None:
        """Show a record immediately, before the command ends."""
        ...

    def live(self, *, transient: bool = False) -> AbstractContextManager[Callable[[object], None]]:
        """Return a context manager that yields a function for showing a record in place of the previous record.

        If ``transient`` is True, the last record is removed at the end.
        """
        ...

    def follow(self) -> AbstractContextManager[Callable[[Any], None]]:
        """Return a context manager that yields a function for showing each new version of the result.

        If the output cannot be overwritten, only the ``news`` attribute of each version after the first is shown.
        """
        ...

    def stop_requested(self) -> AbstractAsyncContextManager[asyncio.Event]:
        """Return a context manager that yields an event. The event is set when the command is asked to stop."""
        ...

    def start_logging(self, *, json: bool = False) -> None:
        """Start showing log records to the user, as text or as JSON."""
        ...


def front_of(ctx: click.Context) -> Front:
    """Return the front end that is running the command."""
    front: Front = ctx.obj
    return front


def options_of(ctx: click.Context) -> dict[str, Any]:
    """Return the `nqnb.Settings` fields that the user set before or after the name of the command."""
    return dict(ctx.meta.get(_OPTIONS_KEY, {}))


def ask(ctx: click.Context, question: Callable[[Client], Awaitable[T]]) -> T:
    """Connect to the server, call ``question`` with the client, disconnect, and return the result of the call.

    If the call raises `UnknownTask`, similar task ids are suggested.
    """
    front = front_of(ctx)
    connected = front.client(options_of(ctx))

    async def conversation() -> T:
        async with connected as nq:
            try:
                return await question(nq)
            except UnknownTask as error:
                raise await suggest_id(nq, error) from None

    return front.run(conversation)


async def say_if_unserved(ctx: click.Context, nq: Client, queue: str, task: TaskInfo | None = None) -> None:
    """Tell the user if no worker is serving a queue. ``task`` is the task that the command is waiting for, if any."""
    if not front_of(ctx).json and await nq.serving.is_missing(queue, task):
        front_of(ctx).say(unserved(queue))


@contextlib.asynccontextmanager
async def saying_if_unserved(ctx: click.Context, nq: Client, task_id: str) -> AsyncIterator[None]:
    """Tell the user if no worker is serving the queue of the task that the ``with`` block is waiting for."""

    async def look() -> None:
        await asyncio.sleep(_UNSERVED_DELAY_SECONDS)
        with contextlib.suppress(NqnbError):
            info = await nq.fetch(task_id)
            if not info.status.terminal:
                await say_if_unserved(ctx, nq, info.queue, info)

    beside = asyncio.ensure_future(look())
    try:
        yield
    finally:
        beside.cancel()


def help_alone(ctx: click.Context) -> str | None:
    """Return the group's help text if no command follows the group's name, or None otherwise."""
    return ctx.get_help() if ctx.invoked_subcommand is None else None


class Command(click.Command):
    """A command that also accepts the shared options. The command's help does not list these options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared_options(self.params, hidden=True)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command's arguments. The error for an unknown option includes a suggestion."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise no_such_option(error, self) from None


class Group(click.Group):
    """A group of commands that also accepts the shared options."""

    command_class = Command
    explains: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"invoke_without_command": True, "subcommand_metavar": "COMMAND [ARGS]...", **kwargs})
        self.params += _shared_options(self.params, hidden=not self.explains)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the group's own options. The error for an unknown option includes a suggestion."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise no_such_option(error, self) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that ``args`` start with. The error for an unknown command includes a suggestion."""
        known = self.get_command(ctx, args[0]) is not None or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:
            raise no_such_command(args[0], self, ctx)
        return super().resolve_command(ctx, args)


class Root(Group):
    """The top-level group. Its help lists the shared options."""

    group_class = Group
    explains = True


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        ctx.meta.setdefault(_OPTIONS_KEY, {})[param.name] = value


def _keep_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        front_of(ctx).json = True


def _keep_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        front_of(ctx).verbose = True


def _shared_options(params: list[click.Parameter], *, hidden: bool) -> list[click.Parameter]:
    file: dict[str, Any] = {"metavar": "FILE", "type": FilePath()}
    shared = [
        _shared("--url", "-u", metavar="URL", help="Server URL, or several URLs separated by commas  [NATS_URL]"),
        _shared("--user", metavar="NAME", help="User name  [NATS_USER]"),
        _shared("--password", metavar="TEXT", help="Password  [NATS_PASSWORD]"),
        _shared("--token", metavar="TEXT", help="Token  [NATS_TOKEN]"),
        _shared("--creds", **file, help="Credentials file  [NATS_CREDS]"),
        _shared("--nkey", **file, help="File that contains an nkey seed  [NATS_NKEY]"),
        _shared("tls_ca", "--tlsca", **file, help="File with trusted CA certificates  [NATS_CA]"),
        _shared("tls_cert", "--tlscert", **file, help="Client certificate  [NATS_CERT]"),
        _shared("tls_key", "--tlskey", **file, help="Private key of the client certificate  [NATS_KEY]"),
        _shared("tls_first", "--tlsfirst", is_flag=True, default=None, help="Start TLS before the NATS INFO message"),
        _shared("--context", metavar="NAME", help="NATS CLI context  [NATS_CONTEXT]"),
        _shared("--name", metavar="NAME", help="Name of this connection on the server  [nqnb]"),
        _shared("connect_timeout", "--timeout", metavar="SECONDS", type=seconds, help="Time limit for connecting  [5]"),
        click.Option(
            ["as_json", "--json"],
            is_flag=True,
            expose_value=False,
            callback=_keep_json,
            help="Print the result as JSON",
        ),
        click.Option(
            ["verbose", "--verbose", "-v"],
            is_flag=True,
            expose_value=False,
            callback=_keep_verbose,
            help="Show which server was chosen and why",
        ),
    ]
    taken = {opt for param in params for opt in param.opts}
    free = [option for option in shared if not taken.intersection(option.opts)]
    for option in free:
        option.hidden = hidden
    return list(free)


def _shared(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, expose_value=False, callback=_keep, **attributes)
