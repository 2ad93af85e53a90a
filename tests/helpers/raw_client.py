"""A client that publishes to any subject. A server accepts subjects that nqnb and nats-py refuse."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


class RawClient:
    """A connection that publishes to any bytes as the subject."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._socket = socket.create_connection((where.hostname, where.port or 4222))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self._socket.sendall(b'CONNECT {"verbose":false}\r\n')

    def publish(self, subject: bytes, data: bytes = b"x") -> None:
        self._socket.sendall(b"PUB %s %d\r\n%s\r\nPING\r\n" % (subject, len(data), data))
        while self._file.readline().strip() != b"PONG":
            pass

    def subscribe(self, subject: bytes) -> None:
        self._socket.sendall(b"SUB %s 1\r\n" % subject)

    def close(self) -> None:
        self._file.close()
        self._socket.close()
