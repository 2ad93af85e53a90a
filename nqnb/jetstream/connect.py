"""The first connection: a server that lets us in, or the true reason why none does.

nats-py by itself tries the first connection for two minutes, waits for ever for a socket whose TLS handshake failed,
takes a server that hangs up for one that is about to answer, and speaks plain text to a server that should speak TLS.
So each address gets one try here, with a client of its own that ends at its first error.
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

import nats.errors
from nats.aio.transport import TcpTransport

from nqnb.errors import BadInput
from nqnb.jetstream.fast_client import LaneClient
from nqnb.jetstream.server_errors import CertificateRefused, Silent, no_server
from nqnb.settings import Settings

_CLOSING = 0.2
"""Seconds for a client to leave a connection that failed; its socket is closed by then, whatever it still awaits."""


class Listener(Protocol):
    """What hears of the fate of a connection; none of it may raise."""

    async def when_disconnected(self) -> None:
        """The connection is away."""
        ...

    async def when_reconnected(self) -> None:
        """It is back."""
        ...

    async def when_closed(self) -> None:
        """It is gone for good."""
        ...

    async def when_refused(self, error: Exception) -> None:
        """The server complains of what was sent, and goes on."""
        ...


L = TypeVar("L", bound=Listener)


async def dial(settings: Settings, listener: Callable[[LaneClient], L]) -> tuple[L, asyncio.Future[Exception]]:
    """Connect to the first server that lets us in, within ``settings.connect_timeout``.

    Args:
        settings: where, and who we are.
        listener: makes what hears of a client; it may be called for several of them, of which one gets connected.

    Returns:
        The listener of the client that is connected, and the first error that this client will meet.

    Raises:
        NoServer: none does; it tells why, for each address.
        BadInput: a file with a certificate, key or credentials is not what it should be.
    """
    options = _options(settings)
    deadline = time.monotonic() + settings.connect_timeout
    urls = random.sample(settings.urls, len(settings.urls))
    reasons: dict[str, Exception] = {}
    for number, url in enumerate(urls):
        # The others are for reconnecting. A silent one must leave them their share of the time.
        client = _Client(insist_on_tls=_insists(settings, url))
        trouble: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        seconds = max(0.0, deadline - time.monotonic()) / (len(urls) - number)
        heard = listener(client)
        try:
            await asyncio.wait_for(_connect(client, urls[number:] + urls[:number], heard, trouble, options), seconds)
            return heard, trouble
        except (asyncio.TimeoutError, TimeoutError, _Refused):
            reasons[url] = client.reason(trouble.result() if trouble.done() else TimeoutError())
            await leave(client)
        except BaseException:
            await leave(client)
            raise
    raise no_server(settings, reasons)


async def leave(client: LaneClient, seconds: float = _CLOSING) -> None:
    """Close a connection, and after some seconds wait no longer for what nats-py still awaits."""
    closing = asyncio.ensure_future(client.close())
    # The socket may break in this very moment, which nobody needs to hear of.
    closing.add_done_callback(lambda task: None if task.cancelled() else task.exception())
    try:
        await asyncio.wait({closing}, timeout=seconds)
        if not closing.done():
            closing.cancel()
            await asyncio.wait({closing}, timeout=_CLOSING)
    finally:
        _close_socket(client)


def _close_socket(client: LaneClient) -> None:
    """Close the socket that nats-py leaves open where its own close is cancelled or fails before it gets there."""
    transport = getattr(client, "_transport", None)
    if isinstance(transport, TcpTransport):
        with contextlib.suppress(OSError, RuntimeError):  # what a broken socket or a closed loop raises
            transport.close()  # type: ignore[no-untyped-call]  # nats-py's


class _Refused(Exception):
    """The try failed; the future beside it knows why."""


class _Client(LaneClient):
    def __init__(self, *, insist_on_tls: bool) -> None:
        super().__init__()
        self._insist_on_tls = insist_on_tls
        self._asks_for_certificate = False

    def reason(self, error: Exception) -> Exception:
        """The error of a try that failed, or a better one."""
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            return Silent() if self.is_connecting else error
        hung_up = (nats.errors.UnexpectedEOF, ConnectionError, ssl.SSLError)
        if self._asks_for_certificate and isinstance(error, hung_up):
            # With TLS 1.3 a server judges ours when we believe ourselves connected.
            return error if isinstance(error, ssl.SSLCertVerificationError) else CertificateRefused()
        return error

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Called with the server's first words, before it gets any of ours.
        if initial_connection and self._insist_on_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise nats.errors.SecureConnWantedError
            info["tls_required"] = True
        self._asks_for_certificate = bool(info.get("tls_verify"))
        await super()._process_info(info, initial_connection)


async def _connect(
    client: LaneClient, urls: list[str], heard: Listener, trouble: asyncio.Future[Exception], options: dict[str, Any]
) -> None:
    dialling = True

    async def error_cb(error: Exception) -> None:
        if not trouble.done():
            trouble.set_result(error)
        if dialling:
            raise _Refused
        await heard.when_refused(error)

    try:
        await client.connect(
            urls,
            error_cb=error_cb,
            disconnected_cb=heard.when_disconnected,
            reconnected_cb=heard.when_reconnected,
            closed_cb=heard.when_closed,
            max_reconnect_attempts=-1,
            # A socket whose other end is gone without a word is noticed within half a minute.
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
    except (nats.errors.Error, OSError, ValueError) as error:
        if not trouble.done():
            trouble.set_result(error)
        raise _Refused from None
    finally:
        dialling = False


def _insists(settings: Settings, url: str) -> bool:
    asked = bool(settings.tls_ca or settings.tls_cert)
    return not settings.tls_first and (url.startswith("tls:") or (asked and url.startswith("nats:")))


def _options(settings: Settings) -> dict[str, Any]:
    """What nats-py calls our settings."""
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
            f"tls_ca {str(settings.tls_ca)!r} has no certificates that can be read ({_why(error)}); name a PEM file"
        ) from None
    if settings.tls_cert:
        try:
            # Without the empty password, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        except (OSError, ValueError) as error:
            raise BadInput(
                f"tls_cert {str(settings.tls_cert)!r} and tls_key {str(settings.tls_key)!r} cannot be used "
                f"({_why(error)}); name PEM files of a certificate and its key, without a passphrase"
            ) from None
    return context


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM file").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


_JWT = re.compile(rb"-BEGIN NATS USER JWT-+\s+(\S+)\s+-+END")
_SEED = re.compile(rb"(?:^|\s)(S[A-Z2-7]{57})(?:\s|$)")


class Credentials:
    """A credentials file, read again for each connection, since such files are renewed.

    nats-py would loop for ever over one without a JWT.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read = _read_credentials(path)

    def sign(self, nonce: str) -> bytes:
        """The signature of the server's nonce; called before `jwt`."""
        # One that is being rewritten at this moment does not unmake what it said before.
        with contextlib.suppress(BadInput):
            self._read = _read_credentials(self._path)
        return base64.b64encode(_key_pair(self._read[1]).sign(nonce.encode()))

    def jwt(self) -> bytearray:
        """The JWT that belongs to the signature."""
        return bytearray(self._read[0])


def _read_credentials(path: str) -> tuple[bytes, bytes]:
    """The JWT and the seed in a credentials file.

    Raises:
        BadInput: they are not in there.
    """
    text = _content("creds", path)
    jwt, seed = _JWT.search(text), _SEED.search(text)
    if jwt is None or seed is None:
        raise BadInput(
            f"creds: {path!r} has no NATS user JWT with its seed; write it with `nsc generate creds` or `nats auth`"
        )
    return jwt[1], _checked(seed[1], f"creds: the seed in {path!r}")


def read_seed(nkey: str) -> str:
    """The seed that `Settings.nkey` is, or that is in the file of that name.

    Raises:
        BadInput: it is not the seed of a user.
    """
    if _SEED.fullmatch(nkey.encode()):
        return _checked(nkey.encode(), "nkey").decode()
    found = _SEED.search(_content("nkey", nkey))
    if found is None:
        raise BadInput(f"nkey: {nkey!r} has no seed (58 characters that begin with SU); write one with `nk -gen user`")
    return _checked(found[1], f"nkey: the seed in {nkey!r}").decode()


def _content(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{name}: the file {path!r} cannot be read ({error.strerror}); name one that can") from None


def _checked(seed: bytes, what: str) -> bytes:
    raw = base64.b32decode(seed + b"=" * 6)  # 58 characters of its alphabet
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise BadInput(f"{what} is damaged: a character is wrong")
    if not seed.startswith(b"SU"):
        raise BadInput(f"{what} is not that of a user: a user's begins with SU")
    return seed


def _key_pair(seed: bytes) -> Any:
    import nkeys  # type: ignore[import-untyped]  # it brings libsodium, which few need

    return nkeys.from_seed(bytearray(seed))
