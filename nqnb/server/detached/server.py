"""A dev server that can be let go of: from then on its keeper ends it on SIGTERM, and no longer with its parent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nqnb.server import supervisor
from nqnb.server.binary import handshake
from nqnb.server.devserver import DevServer
from nqnb.server.kept import START_TIMEOUT, KeptServer


class DetachableServer(DevServer):
    """A `DevServer` in a folder of the caller's choice.

    Args:
        folder: for its configuration, log and status; made by the keeper, who removes it.
        lock: a file descriptor that the keeper holds open for as long as it lives; -1 = none.
        port: see `DevServer`, like the others.
        store_dir: the folder of the streams.
        go_queues: queues of unpatched Go workers.
        config: more configuration.
    """

    def __init__(
        self,
        folder: Path,
        lock: int,
        port: int,
        store_dir: str | os.PathLike[str],
        go_queues: Sequence[str],
        *,
        config: str,
    ) -> None:
        super().__init__(port, store_dir, go_queues, config=config)
        self._folder = folder
        self._held = [] if lock < 0 else [lock]

    @property
    def keeper(self) -> int:
        """The process id of the keeper."""
        return self._started().keeper.pid

    def info(self) -> dict[str, Any]:
        """What the server says of itself.

        Raises:
            DevServerError: it does not answer.
        """
        run = self._started()
        try:
            return handshake(run.port)
        except (OSError, ValueError) as error:
            raise run.failure(f"it did not answer ({error})") from error

    def detach(self) -> None:
        """Let go of it: it no longer ends with this process, nor with `stop`.

        Raises:
            DevServerError: its keeper did not answer.
        """
        with self._lock:
            run = self._started()
            run.order(supervisor.DETACH, time.monotonic() + START_TIMEOUT)
            self._run = None
        run.let_go()
        # Should the keeper end before this process, somebody must take note of it.
        threading.Thread(target=run.keeper.wait, name="nqnb-detached", daemon=True).start()

    def _keep(self, server: Path) -> KeptServer:
        # A long-lived process must not keep the caller's folder busy.
        folder = self._folder
        return KeptServer.begin(server, folder, self.store_dir, self._port, held=self._held, cwd=folder.parent)
