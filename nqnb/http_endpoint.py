"""An HTTP server in a separate thread, for metrics and for health checks. It needs only the standard library."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from nqnb.error_text import clause
from nqnb.errors import NqnbError
from nqnb.listen_address import ListenAddress

log = logging.getLogger("nqnb.http")

Application = Callable[..., Iterable[bytes]]
"""A WSGI application."""

_CLOSE_TIMEOUT_SECONDS = 5.0
"""How long to wait for the HTTP server to stop."""
_POLL_SECONDS = 0.1
"""How often the HTTP server checks whether it must stop."""
_CLIENT_TIMEOUT_SECONDS = 10.0
"""How long to wait for the rest of a request."""


class HttpEndpoint:
    """An HTTP server that runs in a separate thread.

    Args:
        address: the address; port 0 means any free port.
        application: the WSGI application that answers the requests, each in a separate thread.
        serves: what the server serves, such as "metrics". Error messages begin with this text.
        error: the exception class to raise if the address cannot be used.

    Raises:
        NqnbError: the address cannot be used. The exception is an instance of ``error``.
    """

    def __init__(self, address: ListenAddress, application: Application, serves: str, error: type[NqnbError]) -> None:
        try:
            self._server = _server(address)
        except (OSError, UnicodeError) as reason:
            raise error(
                f"{serves} cannot be served on {address}: {clause(reason)}. Choose another port or host."
            ) from None
        self._server.set_app(application)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name=f"nqnb {serves}", daemon=True
        )
        self._thread.start()
        self.address = ListenAddress(address.host, int(self._server.server_address[1]))
        """The address, with the actual port."""

    async def close(self) -> None:
        """Stop the server. The event loop's thread pool is not used, because handlers may block all of its threads."""
        closing = threading.Thread(target=self._close, name="nqnb http close", daemon=True)
        closing.start()
        until = time.monotonic() + _CLOSE_TIMEOUT_SECONDS
        while closing.is_alive() and time.monotonic() < until:  # noqa: ASYNC110  a thread has no event for the loop
            await asyncio.sleep(0.02)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing. Requests are not logged, because probes and scrapes arrive every few seconds."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind the socket without looking up the host's name. `WSGIServer` does this lookup, which can take seconds."""
        # On Windows, this option would allow a port that another process uses. Either process could get a request.
        self.allow_reuse_address = os.name == "posix"
        self.allow_reuse_port = False
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Log an error, for example if a client has closed its connection."""
        log.debug("a request failed", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _server(address: ListenAddress) -> _Server:
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, target = found[0]
    server = _Server6 if family == socket.AF_INET6 else _Server
    return server((str(target[0]), int(target[1])), _Handler)
