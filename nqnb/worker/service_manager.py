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

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class ServiceManager:
    """The socket on which systemd expects reports. The environment must name the socket when this object is created."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._interval = _watchdog_interval()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide systemd's socket from the programs that handlers start, so that they send no reports to systemd."""
        given = {name: value for name in _VARIABLES if (value := os.environ.pop(name, None)) is not None}
        try:
            yield
        finally:
            os.environ.update(given)

    @contextlib.contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Report that the worker is ready and then, until the block ends, alive. Without systemd, do nothing.

        Args:
            what: what the worker does, for ``systemctl status``.
        """
        self._notify(f"READY=1\nSTATUS={what}")
        alive = None if self._interval is None else asyncio.ensure_future(self._report_alive(self._interval))
        try:
            yield
        finally:
            if alive is not None:
                alive.cancel()

    def _notify(self, state: str) -> None:
        """Send a state to systemd, or do nothing if systemd's socket does not exist.

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
    """Return the number of seconds between two reports, which is half of ``WatchdogSec``, or None if it is not set.

    ``WATCHDOG_PID`` is ignored: with ``nqnb worker --processes``, it names the parent of the workers.
    """
    try:
        seconds = int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
    except ValueError:
        return None
    return seconds / 2 if seconds > 0 else None
