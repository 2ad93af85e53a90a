"""What a front door gives to the commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol, TypeVar

from nqnb.client import Client
from nqnb.errors import NqnbError

T = TypeVar("T")


class NeedsYes(NqnbError):
    """A command wants to be confirmed, and there is nobody to ask."""


class Front(Protocol):
    """A front door, in ``ctx.obj``: how a command reaches the server and the person."""

    json: bool
    """Whether JSON was asked for."""
    verbose: bool
    """Whether to tell which server was taken, and why."""

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run an async function to its end."""
        ...

    def client(self, options: dict[str, Any]) -> AbstractAsyncContextManager[Client]:
        """A connected client; ``options`` are the fields of `nqnb.Settings` that were given with the command.

        Called outside of `run`, and entered inside.
        """
        ...

    def stdin(self) -> bytes:
        """What comes in beside the command itself, to its end."""
        ...

    def say(self, text: str) -> None:
        """Tell the person something beside the result."""
        ...

    def waits_for(self, task_id: str) -> None:
        """Take note of the task that the command waits for from now on."""
        ...

    def confirm(self, question: str) -> bool:
        """Ask the person; whether the answer is yes. Called outside of `run`, as it takes as long as it takes.

        Raises:
            NeedsYes: there is nobody to ask.
        """
        ...

    def show(self, record: object) -> None:
        """Show a record before the command ends."""
        ...

    def live(self) -> AbstractContextManager[Callable[[object], None]]:
        """Show a record that changes: each call of the function shows its new state in place of the last one."""
        ...

    def follow(self) -> AbstractContextManager[Callable[[Any], None]]:
        """Like `live`, for what is the result itself: where no state can replace the last one, each is shown anew.

        A record that has ``news`` is shown whole at first, and by its ``news`` from then on.
        """
        ...

    def stop_requested(self) -> AbstractAsyncContextManager[asyncio.Event]:
        """An event that is set when the person or the system wants the command to end."""
        ...

    def start_logging(self) -> None:
        """Let log records be seen."""
        ...
