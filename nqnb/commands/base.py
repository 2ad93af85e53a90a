"""What all commands share: the front door that they speak through, and the options that each of them accepts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol, TypeVar

import click

from nqnb.client import Client
from nqnb.errors import BadInput
from nqnb.names import check_task_id

T = TypeVar("T")

_OPTIONS = "nqnb.options"


class Front(Protocol):
    """A front door: how a command reaches the server and the person."""

    json: bool
    """Whether JSON was asked for."""

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run an async function to its end."""
        ...

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """A connected client; ``options`` are the fields of `nqnb.Settings` that were given with the command."""
        ...

    def say(self, text: str) -> None:
        """Tell the person something beside the result."""
        ...

    def show(self, record: object) -> None:
        """Show a record before the command ends."""
        ...

    def live(self) -> AbstractContextManager[Callable[[object], None]]:
        """Show a record that changes: each call of the function shows its new state in place of the last one."""
        ...

    def stop_requested(self) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the person or the system wants the command to end."""
        ...

    def start_logging(self) -> None:
        """Let log records be seen."""
        ...


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

    async def conversation() -> T:
        async with front.client(options_of(ctx)) as nq:
            return await question(nq)

    return front.run(conversation)


class Command(click.Command):
    """A command that also accepts the shared options, hidden, so that they may stand anywhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared_options(self.params, hidden=True)


class Group(click.Group):
    """A group of commands; without one of them it answers with its help."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"invoke_without_command": True, **kwargs})
        # Only the root has no name of its own choosing beside it, so only there the options are explained.
        self.params += _shared_options(self.params, hidden=self.name != "tree")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that follows, or return the help."""
        return super().invoke(ctx) if ctx._protected_args or ctx.args else ctx.get_help()


def _keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        ctx.meta.setdefault(_OPTIONS, {})[param.name] = value


def _keep_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and ctx.obj is not None:
        ctx.obj.json = True


def _shared_options(params: list[click.Parameter], *, hidden: bool) -> list[click.Parameter]:
    shared = [
        _shared("--url", "-u", metavar="URL", help="Address of the server; several with commas.  [NATS_URL]"),
        _shared("--user", metavar="NAME", help="User name.  [NATS_USER]"),
        _shared("--password", metavar="TEXT", help="Password.  [NATS_PASSWORD]"),
        _shared("--token", metavar="TEXT", help="Token.  [NATS_TOKEN]"),
        _shared(
            "connect_timeout",
            "--timeout",
            metavar="SECONDS",
            type=click.FloatRange(0, min_open=True),
            help="How long connecting may take.  [5]",
        ),
        click.Option(
            ["as_json", "--json"], is_flag=True, expose_value=False, callback=_keep_json, help="Answer in JSON."
        ),
    ]
    taken = {opt for param in params for opt in param.opts}
    free = [option for option in shared if not taken.intersection(option.opts)]
    for option in free:
        option.hidden = hidden
    return list(free)


def _shared(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, expose_value=False, callback=_keep, **attributes)


class Id(click.ParamType[str]):
    """A task id."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType.convert`."""
        try:
            return check_task_id(value)
        except BadInput as error:
            self.fail(str(error), param, ctx)


class Seconds(click.ParamType[float]):
    """A length of time: ``90``, ``1.5``, ``90s``, ``10m``, ``2h30m``, ``1d``."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        if isinstance(value, (int, float)):
            return float(value)
        seconds = parse_seconds(value)
        if seconds is None:
            self.fail(f"{value!r} is no length of time: write seconds, or 90s, 10m, 2h30m, 1d", param, ctx)
        return seconds


_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_LENGTH = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_seconds(text: str) -> float | None:
    """Seconds of a text such as ``90`` or ``2h30m``; None where it is none."""
    found = _LENGTH.fullmatch(text)
    if found is None or not text:
        return None
    return sum(float(number) * unit for number, unit in zip(found.groups(), _UNITS.values(), strict=True) if number)
