"""Where the server is and how to speak with it, as one frozen value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from urllib.parse import unquote, urlsplit

from nqnb.errors import BadInput

DEFAULT_URL = "nats://127.0.0.1:4222"
_SCHEMES = ("nats", "tls", "ws", "wss")


@dataclass(frozen=True)
class Settings:
    """How to reach a NATS server and what to create there.

    Args:
        url: one address or several of one cluster; without a scheme ``nats://`` is meant. A user and password (or a
            token) inside it are taken out of it and kept aside, so that it can be shown. Default: ``NATS_URL``,
            else ``nats://127.0.0.1:4222``.
        user: user name; default ``NATS_USER``.
        password: password; default ``NATS_PASSWORD``.
        token: token; default ``NATS_TOKEN``.
        name: what the server's monitoring calls this connection.
        replicas: how many servers keep each stream and bucket that nqnb creates, 1 to 5.
        ack_wait: seconds after which the server gives a task to another worker when its worker went silent; used
            where nqnb creates the consumer, an existing one keeps its own.
        connect_timeout: seconds for the first connection.
        request_timeout: seconds to wait for one answer of the server.
        retry_for: seconds over which what can safely be asked again is asked again, while the server is away or
            elects a leader.

    Raises:
        BadInput: an address or a number that cannot be used.
    """

    url: str | Sequence[str] = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    name: str = "nqnb"
    replicas: int = 1
    ack_wait: float = 30.0
    connect_timeout: float = 5.0
    request_timeout: float = 5.0
    retry_for: float = 15.0

    def __post_init__(self) -> None:
        given = self.url or os.environ.get("NATS_URL") or DEFAULT_URL
        addresses = given.split(",") if isinstance(given, str) else list(given)
        urls = tuple(self._without_secrets(address) for address in addresses)
        object.__setattr__(self, "url", urls[0] if len(urls) == 1 else urls)
        for name in ("user", "password", "token"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, os.environ.get(f"NATS_{name.upper()}") or None)
        if not 1 <= self.replicas <= 5:
            raise BadInput(f"replicas={self.replicas!r}: NATS keeps 1 to 5 copies")
        for number in ("ack_wait", "connect_timeout", "request_timeout", "retry_for"):
            if not getattr(self, number) > 0:
                raise BadInput(f"{number}={getattr(self, number)!r}: give a number of seconds above 0")

    def _without_secrets(self, address: object) -> str:
        text = str(address).strip()
        parts = urlsplit(text if "://" in text else f"nats://{text}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in _SCHEMES or not parts.hostname or port == -1:
            where = text.rpartition("@")[2]
            raise BadInput(f"{where!r} is not the address of a NATS server: write it like {DEFAULT_URL}")
        if parts.username is not None and parts.password is None and self.token is None:
            object.__setattr__(self, "token", unquote(parts.username))
        elif parts.username is not None and self.user is None:
            object.__setattr__(self, "user", unquote(parts.username))
            object.__setattr__(self, "password", unquote(parts.password or ""))
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return f"{parts.scheme}://{host}:{port or 4222}{parts.path.rstrip('/')}"

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, without secrets."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @classmethod
    def of(cls, settings: Settings | str | Sequence[str] | None, **options: object) -> Settings:
        """Settings from Settings, an address or nothing, with some fields replaced.

        Raises:
            BadInput: an option that Settings does not have, or a value that cannot be used.
        """
        known = {each.name for each in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise BadInput(f"no setting is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
        given = {name: getattr(settings, name) for name in known} if isinstance(settings, cls) else {}
        if settings is not None and not isinstance(settings, cls):
            given = {"url": settings}
        return cls(**{**given, **options})
