"""What is connected to one server, from `open` to `close`: the ground that `nqnb.Client` stands on."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from nqnb.error_text import kind_of
from nqnb.errors import BadInput, ConnectionFailed
from nqnb.settings import Settings
from nqnb.store import StateStore, check_store

if TYPE_CHECKING:
    from typing_extensions import Self

    from nqnb.jetstream.backend import Backend


class Connected:
    """A connection, to be used as ``async with``, or opened and closed by hand."""

    def __init__(self, settings: Settings, store: StateStore | None = None) -> None:
        if not isinstance(settings, Settings):
            raise BadInput(f"settings is of {kind_of(settings)}: give nqnb.Settings, or use nqnb.connect(…).")
        self.settings = settings
        self._store = check_store(store)
        self._backend: Backend | None = None
        self._name = _who()

    async def open(self) -> Self:
        """Connect.

        Raises:
            NoServer: nothing answers there in time, or it turns us away.
            NoJetStream: JetStream is off.
        """
        if self._backend is None:
            # nats is only imported by those who connect.
            from nqnb.jetstream.backend import Backend

            self._backend = await Backend.open(self.settings, self._store)
        return self

    async def close(self) -> None:
        """Disconnect. Tasks go on. Closing twice is fine."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    @property
    def backend(self) -> Backend:
        """What the client speaks through.

        Raises:
            ConnectionFailed: the client is not open.
        """
        if self._backend is None:
            raise ConnectionFailed("the client is not connected; use `async with nqnb.connect(…) as nq`")
        return self._backend

    @property
    def server_version(self) -> str:
        """The version that the server says it has."""
        return self.backend.server_version


def _who() -> str:
    """Who the receipts name: user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
