"""The options that every command accepts, and the conversation with the server that they are for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

import click

from nqnb.client import Client
from nqnb.commands.front import Front
from nqnb.commands.values import FilePath, seconds

T = TypeVar("T")

_OPTIONS = "nqnb.options"


def front_of(ctx: click.Context) -> Front:
    """The front door that runs this command."""
    front: Front = ctx.obj
    return front


def options_of(ctx: click.Context) -> dict[str, Any]:
    """The fields of `nqnb.Settings` that were given before or after the command."""
    return dict(ctx.meta.get(_OPTIONS, {}))


def ask(ctx: click.Context, question: Callable[[Client], Awaitable[T]]) -> T:
    """Connect, ask, disconnect."""
    front = front_of(ctx)
    connected = front.client(options_of(ctx))

    async def conversation() -> T:
        async with connected as nq:
            return await question(nq)

    return front.run(conversation)


def help_alone(ctx: click.Context) -> str | None:
    """The answer of a group that no command follows."""
    return ctx.get_help() if ctx.invoked_subcommand is None else None


class Command(click.Command):
    """A command that also accepts the shared options, hidden, so that they may stand anywhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared_options(self.params, hidden=True)


class Group(click.Group):
    """A group of commands that accepts the shared options, too."""

    command_class = Command
    explains: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"invoke_without_command": True, "subcommand_metavar": "COMMAND [ARGS]...", **kwargs})
        self.params += _shared_options(self.params, hidden=not self.explains)


class Root(Group):
    """The outermost group, whose help explains the shared options."""

    group_class = Group
    explains = True


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        ctx.meta.setdefault(_OPTIONS, {})[param.name] = value


def _keep_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        front_of(ctx).json = True


def _keep_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        front_of(ctx).verbose = True


def _shared_options(params: list[click.Parameter], *, hidden: bool) -> list[click.Parameter]:
    file: dict[str, Any] = {"metavar": "FILE", "type": FilePath()}
    shared = [
        _shared("--url", "-u", metavar="URL", help="Address of the server, several with commas  [NATS_URL]"),
        _shared("--user", metavar="NAME", help="User name  [NATS_USER]"),
        _shared("--password", metavar="TEXT", help="Password  [NATS_PASSWORD]"),
        _shared("--token", metavar="TEXT", help="Token  [NATS_TOKEN]"),
        _shared("--creds", **file, help="Credentials file  [NATS_CREDS]"),
        _shared("--nkey", **file, help="File with an nkey's seed  [NATS_NKEY]"),
        _shared("tls_ca", "--tlsca", **file, help="Certificates of the authorities to trust  [NATS_CA]"),
        _shared("tls_cert", "--tlscert", **file, help="Our certificate  [NATS_CERT]"),
        _shared("tls_key", "--tlskey", **file, help="Its private key  [NATS_KEY]"),
        _shared("tls_first", "--tlsfirst", is_flag=True, default=None, help="TLS handshake before the greeting"),
        _shared("--context", metavar="NAME", help="Context of the NATS CLI  [NATS_CONTEXT]"),
        _shared("--name", metavar="NAME", help="What the server calls this connection  [nqnb]"),
        _shared(
            "connect_timeout", "--timeout", metavar="SECONDS", type=seconds, help="How long connecting may take  [5]"
        ),
        click.Option(
            ["as_json", "--json"], is_flag=True, expose_value=False, callback=_keep_json, help="Answer in JSON"
        ),
        click.Option(
            ["verbose", "--verbose", "-v"],
            is_flag=True,
            expose_value=False,
            callback=_keep_verbose,
            help="Say which server was taken, and why",
        ),
    ]
    taken = {opt for param in params for opt in param.opts}
    free = [option for option in shared if not taken.intersection(option.opts)]
    for option in free:
        option.hidden = hidden
    return list(free)


def _shared(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, expose_value=False, callback=_keep, **attributes)
