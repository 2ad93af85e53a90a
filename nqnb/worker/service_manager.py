"""Report a worker's state to systemd, if systemd has started the worker with ``Type=notify``; see sd_notify(3).

The worker reports when it can receive cancels and tasks. If the unit sets ``WatchdogSec``, the worker also reports
regularly that its event loop is alive, and systemd restarts the worker if these reports stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceManager:
    """A client of systemd's notification socket. The environment variable ``NOTIFY_SOCKET`` names the socket."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._interval = _watchdog_interval()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Within a block, hide systemd's socket from the programs that handlers start, so that they cannot use it."""
        given = {name: value for name in _VARIABLES if (value := os.environ.pop(name, None)) is not None}
        try:
            yield
        finally:
            os.environ.update(given)

    @contextlib.contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Report that the worker is ready, and within the block, report regularly that it is alive.

        Without systemd, do nothing.

        Args:
            what: a description of what the worker does, which ``systemctl status`` shows.
        """
        self._notify(f"READY=1\nSTATUS={what}")
        alive = None if self._interval is None else asyncio.ensure_future(self._report_alive(self._interval))
        try:
            yield
        finally:
            if alive is not None:
                alive.cancel()

    def _notify(self, state: str) -> None:
        """Send a state to systemd. Do nothing if there is no systemd socket.

        Args:
            state: lines such as ``READY=1``. ``STOPPING=1`` is never sent, because one of several workers may stop
                while the others continue.
        """
        address = self._address
        if not address.startswith(("/", "@")):
            return
        if address.startswith("@"):
            address = "\0" + address[1:]  # an abstract socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # the event loop must not wait for systemd
            sender.sendto(state.encode(), address)

    async def _report_alive(self, interval: float) -> None:
        while True:
            self._notify("WATCHDOG=1")
            await asyncio.sleep(interval)


def _watchdog_interval() -> float | None:
    """Return the number of seconds between two reports: half of the unit's ``WatchdogSec``, or None if it is not set.

    ``WATCHDOG_PID`` is ignored, because with ``nqnb worker --processes``, it is the id of the workers' parent process.
    """
    try:
        seconds = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    return seconds / 2 if seconds > 0 else None
