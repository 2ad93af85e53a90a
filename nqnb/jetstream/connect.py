"""Open a connection to the first server that accepts it, or report why each attempt failed.

By itself, nats-py retries the first connection for two minutes. If a TLS handshake fails, nats-py waits forever. If the
server closes the connection, nats-py does not report an error. If the server does not offer TLS, nats-py sends
unencrypted data even if the settings require TLS. Therefore, this module tries each address once, with a separate
client that stops at the first error.

This module also reads and checks credentials files and nkey seeds.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import random
import re
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import nats.errors

from nqnb.errors import BadInput
from nqnb.jetstream.fast_client import FastClient
from nqnb.jetstream.server_errors import CertificateRefused, DetachedServerDown, Silent, no_server
from nqnb.server import detached
from nqnb.server.server_choice import uses_detached
from nqnb.settings import Settings

_CLOSE_SECONDS = 0.2
"""Seconds to wait for nats-py to close a failed connection. After this time, the socket is closed directly."""
_JWT = re.compile(rb"-BEGIN NATS USER JWT-+\s+(\S+)\s+-+END")
_SEED = re.compile(rb"(?:^|\s)(S[A-Z2-7]{57})(?:\s|$)")


class Listener(Protocol):
    """The callbacks for the events of a connection. The callbacks must not raise exceptions."""

    async def when_disconnected(self) -> None:
        """Handle the loss of the connection."""
        ...

    async def when_reconnected(self) -> None:
        """Handle a successful reconnect."""
        ...

    async def when_closed(self) -> None:
        """Handle the permanent closing of the connection."""
        ...

    async def when_refused(self, error: Exception) -> None:
        """Handle an error that the server reports on an open connection, or the error of a failed reconnect."""
        ...


L = TypeVar("L", bound=Listener)


async def dial(settings: Settings, listener: Callable[[FastClient], L]) -> tuple[L, asyncio.Future[Exception]]:
    """Connect to the first server that accepts a connection within ``settings.connect_timeout`` seconds.

    Args:
        settings: the addresses and the credentials.
        listener: a function that creates a listener for a client. The function is called for each attempt.

    Returns:
        The listener for the connected client, and a future for the client's first error.

    Raises:
        NoServer: no server accepted the connection. The message states the reason for each address.
        BadInput: a certificate file, key file or credentials file is invalid.
    """
    deadline = time.monotonic() + settings.connect_timeout
    if settings.detached and (server := await _running_detached()) is not None:
        # The detached server may have been restarted since the settings were created.
        settings = settings.at_detached(server.url, server.token)
    options = _options(settings)
    urls = random.sample(settings.urls, len(settings.urls))
    reasons: dict[str, Exception] = {}
    for number, url in enumerate(urls):
        # This client tries one address, and uses the other addresses only for reconnects. Each attempt gets an equal
        # share of the remaining time, because a silent server must not use up all of it.
        client = _FirstClient(settings, require_tls=_requires_tls(settings, url))
        trouble: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        seconds = max(0.0, deadline - time.monotonic()) / (len(urls) - number)
        connected = listener(client)
        try:
            await asyncio.wait_for(
                _connect(client, urls[number:] + urls[:number], connected, trouble, options), seconds
            )
            return connected, trouble
        except (asyncio.TimeoutError, TimeoutError, _Refused):
            reasons[url] = client.reason(trouble.result() if trouble.done() else TimeoutError())
            await leave(client)
        except BaseException:
            await leave(client)
            raise
    found = await asyncio.to_thread(detached.look)
    url = found.server.url if found.server is not None and found.condition is detached.Condition.RUNNING else ""
    wanted = settings.detached or uses_detached(settings)
    stopped = wanted and found.condition is detached.Condition.NONE and detached.was_started()
    raise no_server(settings, reasons, url, stopped=stopped)


async def _running_detached() -> detached.Detached | None:
    """Return the user's detached server, or None if it is not running."""
    found = await asyncio.to_thread(detached.look)
    return found.server if found.condition is detached.Condition.RUNNING else None


async def leave(client: FastClient, seconds: float = _CLOSE_SECONDS) -> None:
    """Close a client. If nats-py does not finish within ``seconds``, close the socket directly."""
    closing = asyncio.ensure_future(client.close())
    # If the socket breaks now, asyncio must not report that the error was never retrieved.
    closing.add_done_callback(lambda task: None if task.cancelled() else task.exception())
    try:
        await asyncio.wait({closing}, timeout=seconds)
        if not closing.done():
            closing.cancel()
            await asyncio.wait({closing}, timeout=_CLOSE_SECONDS)
    finally:
        _close_socket(client)


def _close_socket(client: FastClient) -> None:
    """Close the client's socket. nats-py leaves the socket open if the attempt to connect is cancelled or fails."""
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    # A TLS connection that is closed twice raises AttributeError for each later write.
    if isinstance(writer, asyncio.StreamWriter) and not writer.is_closing():
        with contextlib.suppress(OSError, RuntimeError):  # raised for a broken socket or a closed loop
            writer.close()


class _Refused(Exception):
    """Signals that an attempt to connect failed. The error itself is in the attempt's future."""


class _FirstClient(FastClient):
    def __init__(self, settings: Settings, *, require_tls: bool) -> None:
        super().__init__()
        self._settings = settings
        self._require_tls = require_tls
        self._needs_certificate = False
        self.was_connected = False
        """Whether the client has connected before. If so, every further attempt to connect is a reconnect."""

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """The TLS settings. nats-py reads this property before each TLS handshake."""
        if self.was_connected and "tls" in self.options:
            # The files may have been renewed. If they are currently being replaced, their previous content is used.
            with contextlib.suppress(BadInput):
                self.options["tls"] = _tls(self._settings)
        return super().ssl_context

    def reason(self, error: Exception) -> Exception:
        """Return the error of a failed attempt, or a more specific error if one is known."""
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            return Silent() if self.is_connecting else error
        connection_closed = (nats.errors.UnexpectedEOF, ConnectionError, ssl.SSLError)
        if self._needs_certificate and isinstance(error, connection_closed):
            # With TLS 1.3 the server checks the client certificate after the client has finished the handshake.
            return error if isinstance(error, ssl.SSLCertVerificationError) else CertificateRefused()
        return error

    async def _connect_to_server(self, s: Any) -> None:
        # nats-py calls this method for each attempt, with the server that it has chosen from its list.
        if self._settings.detached and self.is_reconnecting:
            # A restart changes the token of the detached server, and may change its port. The token is sent only after
            # the server has been identified as the user's server.
            server = await _running_detached()
            if server is None:
                raise DetachedServerDown
            s.uri = urlsplit(server.url)
            self.options["token"] = server.token
        await super()._connect_to_server(s)

    async def _select_next_server(self) -> None:
        # nats-py calls this method to open a socket. If the server refused the last attempt, its socket is still open.
        _close_socket(self)
        self._needs_certificate = False
        await super()._select_next_server()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py calls this method with the server's first message, before it sends anything to the server.
        if initial_connection and self._require_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        self._needs_certificate = bool(info.get("tls_verify"))
        await super()._process_info(info, initial_connection)
        self._forget_servers(info)
        self._pass_on_tls_name()

    def _forget_servers(self, info: dict[str, Any]) -> None:
        """Remove the addresses that a server listed in an earlier message but does not list in the current message.

        Otherwise, nats-py would try the addresses of former servers at each reconnect, one after another.
        """
        listed, current = info.get("connect_urls"), getattr(self, "_current_server", None)
        pool = getattr(self, "_server_pool", None)
        if listed and pool:
            pool[:] = [
                server
                for server in pool
                if not getattr(server, "discovered", False) or server is current or server.uri.netloc in listed
            ]

    def _pass_on_tls_name(self) -> None:
        """Set the host name for which the certificates of new servers are checked: the TLS name of the current server.

        Otherwise, nats-py would use the host name in the address of the current server. This address may come from a
        server's list.
        """
        current: Any = getattr(self, "_current_server", None)
        name = getattr(current, "tls_name", None)
        if name is not None:
            for server in getattr(self, "_server_pool", None) or ():
                if getattr(server, "discovered", False) and server.tls_name == current.uri.hostname:
                    server.tls_name = name

    def _connect_command(self) -> bytes:
        # nats-py calls this method after the TLS handshake. asyncio logs a warning at the end of a TLS connection whose
        # protocol does not know that TLS is used, and nats-py does not inform the protocol.
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.get_extra_info("sslcontext") is not None:
            protocol = writer.transport.get_protocol()
            if protocol is not None:  # None: the server has already ended the connection
                setattr(protocol, "_over_ssl", True)  # noqa: B010  it has no public name
        if self.was_connected:
            self._read_nkey_again()
        command: bytes = super()._connect_command()
        return command

    def _read_nkey_again(self) -> None:
        """Read the nkey file again. If the file is invalid, keep using its previous content."""
        members = ("_nkeys_seed_str", "_setup_nkeys_connect")
        if self._settings.nkey is not None and all(hasattr(self, name) for name in members):
            with contextlib.suppress(BadInput):
                self._nkeys_seed_str = read_seed(str(self._settings.nkey))
                self._setup_nkeys_connect()


async def _connect(
    client: _FirstClient,
    urls: list[str],
    listener: Listener,
    trouble: asyncio.Future[Exception],
    options: dict[str, Any],
) -> None:
    connecting = True

    async def error_cb(error: Exception) -> None:
        if not trouble.done():
            trouble.set_result(error)
        if connecting:
            raise _Refused
        await listener.when_refused(client.reason(error))

    try:
        await client.connect(
            urls,
            error_cb=error_cb,
            disconnected_cb=listener.when_disconnected,
            reconnected_cb=listener.when_reconnected,
            closed_cb=listener.when_closed,
            max_reconnect_attempts=-1,
            # These intervals detect a dead connection within half a minute.
            ping_interval=10,
            max_outstanding_pings=2,
            reconnect_time_wait=1,
            dont_randomize=True,
            pending_size=8 * 1024 * 1024,
            **options,
        )
        if not client.is_connected:
            trouble.set_result(nats.errors.UnexpectedEOF())
            raise _Refused
        client.was_connected = True
    except (nats.errors.Error, OSError, ValueError) as error:
        if not trouble.done():
            trouble.set_result(error)
        raise _Refused from None
    finally:
        connecting = False


def _requires_tls(settings: Settings, url: str) -> bool:
    configured = bool(settings.tls_ca or settings.tls_cert)
    return not settings.tls_first and (url.startswith("tls:") or (configured and url.startswith("nats:")))


def _options(settings: Settings) -> dict[str, Any]:
    """Convert the settings to options for nats-py."""
    options: dict[str, Any] = {
        "name": settings.name,
        "connect_timeout": settings.connect_timeout,
        "user": settings.user,
        "password": settings.password,
        "token": settings.token,
        "tls_handshake_first": settings.tls_first,
    }
    if settings.tls_ca or settings.tls_cert or settings.tls_first:
        options["tls"] = _tls(settings)
    if settings.creds is not None:
        credentials = Credentials(str(settings.creds))
        options["user_jwt_cb"] = credentials.jwt
        options["signature_cb"] = credentials.sign
    if settings.nkey is not None:
        options["nkeys_seed_str"] = read_seed(str(settings.nkey))
    return options


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tls_ca {str(settings.tls_ca)!r} is invalid: no certificate can be read from this file ({_why(error)}). "
            "Set tls_ca to the PEM file of the authority that signed the server's certificate."
        ) from None
    if settings.tls_cert:
        try:
            # Without a password, OpenSSL would prompt for one on the terminal.
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        except (OSError, ValueError) as error:
            raise BadInput(
                f"tls_cert {str(settings.tls_cert)!r} or tls_key {str(settings.tls_key)!r} is invalid: {_why(error)}. "
                "Set tls_cert and tls_key to the PEM files of a certificate and its key. The key must not have a "
                "passphrase."
            ) from None
    return context


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a PEM file").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


class Credentials:
    """A credentials file. It is read again for each connection, because the credentials may have been renewed.

    This class reads the file itself, because nats-py loops forever if the file contains no JWT.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read = _read_credentials(path)

    def sign(self, nonce: str) -> bytes:
        """Sign the server's nonce, and return the signature. nats-py calls this method before `jwt`."""
        # If the file is currently being rewritten, its previous content is used.
        with contextlib.suppress(BadInput):
            self._read = _read_credentials(self._path)
        return base64.b64encode(_key_pair(self._read[1]).sign(nonce.encode()))

    def jwt(self) -> bytearray:
        """Return the JWT from the version of the file that the last call to `sign` used."""
        return bytearray(self._read[0])


def _read_credentials(path: str) -> tuple[bytes, bytes]:
    """Return the JWT and the seed from a credentials file. Raise BadInput if the file is invalid."""
    text = _read_file("creds", path)
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise BadInput(
            f"creds {path!r} is invalid: the file must contain a NATS user JWT and a seed. "
            "Create the file with `nsc generate creds` or `nats auth`."
        )
    return jwt[1], _checked_seed(seed[1], f"creds {path!r} is invalid: the seed")


def read_seed(nkey: str) -> str:
    """Return the seed from `Settings.nkey`, which is either a seed or the path of a file that contains a seed.

    Raises:
        BadInput: the file cannot be read, or the seed is missing, invalid or not a user seed.
    """
    if _SEED.fullmatch(nkey.encode()):
        return _checked_seed(nkey.encode(), "nkey is invalid: the seed").decode()
    found = _SEED.search(_read_file("nkey", nkey))
    if found is None:
        raise BadInput(
            f"nkey file {nkey!r} is invalid: it contains no seed (58 characters, beginning with SU). "
            "Generate a seed with `nk -gen user`."
        )
    return _checked_seed(found[1], f"nkey {nkey!r} is invalid: the seed").decode()


def _read_file(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            f"{name} {path!r} is invalid: the file cannot be read ({error.strerror}). Check its path and permissions."
        ) from None


def _checked_seed(seed: bytes, what: str) -> bytes:
    raw = base64.b32decode(seed + b"=" * 6)  # pads the 58 characters to a multiple of 8
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise BadInput(f"{what} is damaged (its checksum does not match). Copy the seed again.")
    if not seed.startswith(b"SU"):
        raise BadInput(f"{what} does not belong to a user. Use a seed that begins with SU.")
    return seed


def _key_pair(seed: bytes) -> Any:
    import nkeys  # type: ignore[import-untyped]  # imported here because it loads libsodium, which few programs need

    return nkeys.from_seed(bytearray(seed))
