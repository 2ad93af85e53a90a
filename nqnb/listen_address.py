"""Parse the address on which an HTTP endpoint listens."""

from __future__ import annotations

from typing import NamedTuple

from nqnb.error_text import shown
from nqnb.errors import BadInput

ALL_INTERFACES = "0.0.0.0"  # noqa: S104  Prometheus usually runs on another machine
THIS_MACHINE = "127.0.0.1"
MAX_PORT = 65535


class ListenAddress(NamedTuple):
    """The address on which an HTTP server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def of(cls, value: object, serves: str = "metrics", default_host: str = ALL_INTERFACES) -> ListenAddress:
        """Convert a port, or a string such as ``"9464"`` or ``"127.0.0.1:9464"``, to an address.

        Args:
            value: the port or the string.
            serves: what the server serves, such as "metrics". Error messages contain this text.
            default_host: the host to use if the value has no host.

        Raises:
            BadInput: the value is not an address.
        """
        if isinstance(value, cls):
            return value
        host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", value)
        host = host.removeprefix("[").removesuffix("]")
        if isinstance(port, str) and port.isascii() and port.isdigit() and len(port) < 9:
            port = int(port)
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= MAX_PORT:
            raise BadInput(
                f"{serves} address {shown(value)} is invalid: expected PORT or HOST:PORT. "
                f"Use a port from 0 to {MAX_PORT}, such as 9464."
            )
        return cls(host or default_host, port)
