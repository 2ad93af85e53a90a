"""Asks the person a question, where there is one: not under Run All, nor where the front end has no way to ask."""

from __future__ import annotations

import sys
from typing import Any

from IPython.core.error import StdinNotImplementedError

from nqnb.commands.command import NeedsYes
from nqnb.text import clean

_LOOK = 300
"""Milliseconds in which the other cells of a Run All arrive, behind the one that asks."""


def confirm(question: str, kernel: Any) -> bool:
    """Ask, and return whether the answer is yes.

    Front ends that run a notebook without a person (nbclient, papermill) say that they take no questions. A person's
    Run All sends all cells at once, so what waits behind this one tells that; in its last cell, the person is asked.

    Args:
        question: what is asked.
        kernel: the kernel that the cell runs in; None in a terminal.

    Raises:
        NeedsYes: there is nobody to ask.
    """
    if kernel is None and not (sys.stdin and sys.stdin.isatty()):
        raise NeedsYes(f"{question} There is no terminal to ask on: add --yes")
    if kernel is not None and others_wait(kernel):
        raise NeedsYes(f"{question} Other cells wait behind this one, as under Run All: add --yes, or run it alone")
    try:
        answer = input(f"{clean(question)} [y/N]: ")
    except StdinNotImplementedError:
        raise NeedsYes(f"{question} There is nobody to ask where this runs: add --yes") from None
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def others_wait(kernel: Any) -> bool:
    """Whether cells wait behind the one that runs; False where the kernel does not let that be seen."""
    stream = _requests(kernel)
    look_again = getattr(stream, "_handle_events", None)
    if stream is None or look_again is None:
        return False
    waits = bool(stream.socket.poll(_LOOK))
    # To have looked takes the stream's own notice away.
    stream.io_loop.add_callback(look_again, stream.socket, 0)
    return waits


def _requests(kernel: Any) -> Any:
    """The stream by which the main thread gets its requests, of ipykernel 7 or 6: neither tells by a public name."""
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is None:
        return getattr(kernel, "shell_stream", None)
    pair = getattr(getattr(thread, "manager", None), "_shell_channel_to_main", None)
    return getattr(pair, "to_stream", None)
