"""Report a worker's state to systemd, if systemd has started the worker with ``Type=notify``; see sd_notify(3).

systemd learns when the worker can receive cancels and tasks. If the unit has a ``WatchdogSec``, the worker also reports
regularly that its event loop is alive, and systemd restarts a worker that no longer does so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Report that the worker is ready and then, until the block ends, that it is alive. Without systemd, do nothing.

    Args:
        what: what the worker does, for ``systemctl status``.
    """
    notify(f"READY=1\nSTATUS={what}")
    interval = _watchdog_interval()
    alive = None if interval is None else asyncio.ensure_future(_report_alive(interval))
    try:
        yield
    finally:
        if alive is not None:
            alive.cancel()


def notify(state: str) -> None:
    """Send a state to systemd. Do nothing if systemd's socket does not exist.

    Args:
        state: lines such as ``READY=1``. ``STOPPING=1`` is never sent, because one of several workers may stop while
            the others continue.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # the event loop must not wait for systemd
        sender.sendto(state.encode(), address)


def _watchdog_interval() -> float | None:
    """Return the number of seconds between two reports, which is half of ``WatchdogSec``, or None if it is not set.

    ``WATCHDOG_PID`` is ignored: with ``nqnb worker --processes``, it names the parent of the workers.
    """
    try:
        seconds = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    return seconds / 2 if seconds > 0 else None


async def _report_alive(interval: float) -> None:
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
