"""The live tables of queues and workers in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from nqnb.client import Client
from nqnb.concurrency import spawn
from nqnb.notebook.loop import LOOP
from nqnb.widgets.board_sources import BoardSource, QueueSource, WorkerSource

if TYPE_CHECKING:
    from nqnb.widgets.board import Board


def queue_board(client: Client) -> Board:
    """Return a live table of all queues."""
    return open_board("queues", QueueSource(client))


def worker_board(client: Client) -> Board:
    """Return a live table of all workers, including lost workers."""
    return open_board("workers", WorkerSource(client))


def open_board(title: str, source: BoardSource, on_close: Callable[[], None] = lambda: None) -> Board:
    """Return a live table that shows the content of a source.

    Args:
        title: the title of the table.
        source: the source of the table's content and of the buttons' actions.
        on_close: a function that is called once when the table is closed.
    """
    from nqnb.widgets.board import Board

    def start(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        LOOP.soon(lambda: spawn(work()))

    return Board(title, LOOP.call(source.read()), source.read, source.act, start, on_close)
