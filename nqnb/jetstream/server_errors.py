"""Convert errors from the server, nats-py and the socket to nqnb errors."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Mapping

import msgspec
import nats.errors

from nqnb.errors import ConnectionFailed, NoResponders, NoRoom, NoServer, ServerRefused, Unavailable
from nqnb.settings import Settings
from nqnb.text import in_parentheses

NOT_FOUND = (10059, 10014)
"""JetStream's codes for "stream not found" and "consumer not found"."""
MESSAGE_NOT_FOUND = (10037, 10043, 10057)
"""JetStream's codes for a message that does not exist."""
NO_JETSTREAM_CODES = (10039, 10076)
"""JetStream's codes for "JetStream is not enabled" (for the account, or on the server)."""

STREAM_FULL = 10077
"""JetStream's code for "the stream cannot store the message", for example because of the stream's limits."""
_NO_FILES = 10049
"""JetStream's code for "error creating store for stream", for example while a deleted stream's files are removed."""
_TOO_MANY = 10167
"""JetStream's code for "too many requests": the server's buffer for messages to be stored in a stream is full."""
_NOT_NOW = {
    **dict.fromkeys((10007, 10008, 10009), "JetStream currently has no leader"),
    **dict.fromkeys(NO_JETSTREAM_CODES, "JetStream is currently off"),
    10004: "some servers of the cluster did not reply",
    10041: "the servers of the cluster currently disagree",
    _NO_FILES: "the server currently cannot create the stream's files",
    10075: "the cluster is moving the stream",
    STREAM_FULL: "the stream currently cannot store messages",
    10118: "the servers that have the stream are offline",
    10119: "the servers that have the consumer are offline",
    10158: "the server is still storing an earlier copy of the message",
    10163: "an earlier write to the same key is still in progress",
    _TOO_MANY: "too many messages are waiting to be stored in the stream",
}
"""JetStream's codes for temporary errors, with descriptions. The request was valid and can be retried."""
_NO_PEERS = 10005
"""JetStream's code for "not enough servers for the replicas". If no server is offline, ``replicas`` is too high."""
_LIMITS = {
    10002: "the account's storage limit",
    10023: "the server's storage limit (max_file_store or max_memory_store)",
    10028: "the memory limit (max_memory_store, or the account's)",
    10047: "the storage limit (max_file_store, or the account's)",
}
"""JetStream's codes for exhausted storage, with the name of the limit that was reached."""
_FULL = re.compile("maximum (bytes|messages)|no space|disk", re.IGNORECASE)
"""A pattern that matches the description of error 10077 if the stream or the disk is full."""

_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
"""OpenSSL's codes for a certificate chain without a trusted authority."""
_CERTIFICATE_REMEDY = "set tls_cert and tls_key to a certificate and key that the server accepts"
_PERMISSIONS = "ask the server's operator for the permissions listed in nqnb's docs/permissions.md"
_TLS_FIRST_REMEDY = {
    False: "if the server expects the TLS handshake first, set tls_first",
    True: "if the server does not expect the TLS handshake first, remove tls_first",
}


class ApiError(msgspec.Struct):
    """An error in a reply from the JetStream API."""

    code: int = 0
    err_code: int = 0
    description: str = ""


def translated(error: nats.errors.Error, settings: Settings, subject: str, reason: str = "") -> ConnectionFailed:
    """Convert a nats-py error to an nqnb error. The error occurred while sending to ``subject``.

    ``reason`` is the reason why the connection is down, or "" if the reason is not known or the connection is up.
    """
    because = in_parentheses(reason)
    if isinstance(error, nats.errors.OutboundBufferLimitError):
        return NoResponders(
            f"sending to {subject!r} failed: the send buffer is full, because the connection to {address(settings)} is "
            f"down or too slow{because}. Try again once the server is available.",
            subject,
        )
    if isinstance(error, nats.errors.ConnectionClosedError):
        return ConnectionFailed(
            f"sending to {subject!r} failed: the connection to {address(settings)} is closed{because}. "
            "Open a new connection."
        )
    return ConnectionFailed(
        f"sending to {subject!r} failed: the connection to {address(settings)} reported an error ({error}). Try again."
    )


def refused(error: ApiError, what: str) -> ServerRefused | Unavailable:
    """Convert a JetStream error to an nqnb error. ``what`` is the request, such as "storing a message on 'q.task'"."""
    facts = (error.code, error.err_code, error.description)
    details = f"{error.description}, code {error.err_code or error.code}"
    limit = _LIMITS.get(error.err_code)
    if error.err_code == STREAM_FULL and (found := _FULL.search(error.description)):
        limit = f"the stream's maximum number of {found[1]}" if found[1] else "the capacity of the server's disk"
    if limit is not None:
        return NoRoom(
            f"{what} failed: {limit} has been reached ({details}). "
            "Free space with `nqnb prune` or `nqnb queue purge QUEUE`, or raise the limit.",
            what,
            *facts,
        )
    why = _NOT_NOW.get(error.err_code)
    if error.err_code == _NO_PEERS and "offline" in error.description:
        why = "too many servers of the cluster are offline"
    if why is None and error.code == 503 and not error.err_code:
        why = "JetStream is currently unavailable"
    if error.err_code == _NO_FILES:
        remedy = "Try again. If the error persists, the server's log shows why its storage directory cannot be used."
    elif error.err_code == _TOO_MANY:
        remedy = (
            "Try again. If the error persists, use a faster disk, or raise max_buffered_msgs and max_buffered_size in "
            "the server's JetStream configuration."
        )
    else:
        remedy = (
            "Check that a majority of the cluster's servers are running (`nats server report jetstream`), then try "
            "again."
        )
    if why is not None:
        return Unavailable(f"{what} failed: {why} ({details}). {remedy}", what, *facts)
    return ServerRefused(
        f"the server refused {what}: {details}. Check the request, and the server's limits and permissions.", *facts
    )


def denied_subject(error: BaseException) -> tuple[str, str] | None:
    """Return the denied operation ("publish" or "subscribe") and subject, or None if no permission is missing."""
    found = re.search(r'permissions violation for (publish|subscription) to "([^"]+)"', str(error), re.IGNORECASE)
    return None if found is None else ("publish" if found[1].lower() == "publish" else "subscribe", found[2])


def not_permitted(settings: Settings, verb: str, subject: str) -> ServerRefused:
    """Return the error for a request that the server did not answer because the user lacks a permission."""
    who = f"user {settings.user!r}" if settings.user else "this user"
    text = f"{who} may not {verb} to {subject!r}"
    return ServerRefused(
        f"the server refused a request: {text}. {_PERMISSIONS[0].upper()}{_PERMISSIONS[1:]}.", 403, 0, text
    )


class Silent(TimeoutError):
    """The server accepted the connection but did not send any data."""


class CertificateRefused(ConnectionError):
    """The server closed the connection because the client certificate was missing or refused."""


class DetachedServerDown(ConnectionRefusedError):
    """The user's detached server is not running."""


def why_lost(settings: Settings, error: BaseException) -> str:
    """Return the reason why a connection was lost or a reconnect failed, and a remedy, without secrets.

    If the server is only unavailable, the text has no remedy, because the client reconnects on its own.
    """
    why, remedy = _reason(settings, error, "check the server's limits and its log")
    return _without_secrets(why if is_unavailable(error) else f"{why}; {remedy}", settings)


def is_unavailable(error: BaseException) -> bool:
    """Return whether an attempt to connect failed only because the server is down or cannot be reached."""
    if isinstance(error, (ssl.SSLError, socket.gaierror, CertificateRefused)):
        return False
    unavailable = (OSError, asyncio.TimeoutError, nats.errors.UnexpectedEOF)
    return isinstance(error, unavailable) or "expecting INFO" in str(error)


def no_server(
    settings: Settings, reasons: Mapping[str, BaseException], detached: str = "", *, stopped: bool = False
) -> NoServer:
    """Return the error for a failed connection attempt, with a reason and a remedy for each address.

    Args:
        settings: the settings.
        reasons: the error for each address.
        detached: the address of the user's detached server, or an empty string if the server is not running.
        stopped: whether the user's detached server would have been used, but has been stopped.
    """
    where = address(settings)
    another = "start a server with `nqnb up --detach`, or set another address with --url or NATS_URL"
    if stopped:
        another = (
            "your detached server is stopped; start it with `nqnb up --detach`, or set another address with --url or "
            "NATS_URL"
        )
    if detached and detached not in settings.urls:
        another = f"your detached server is running at {detached}; to use it, do not set url, NATS_URL or context"
    found: dict[tuple[str, str], list[str]] = {}
    for url in settings.urls:
        if url in reasons:
            why, remedy = _reason(settings, reasons[url], another)
            found.setdefault((_without_secrets(why, settings), remedy), []).append(url)
    if len(found) == 1:
        ((why, remedy),) = found
        text = f"cannot connect to a NATS server at {where}: {why}; {remedy}"
    else:
        reasons_by_url = " | ".join(f"{', '.join(urls)}: {why}; {remedy}" for (why, remedy), urls in found.items())
        text = f"cannot connect to a NATS server at any address: {reasons_by_url}"
    return NoServer(text, where)


def _reason(settings: Settings, reason: BaseException, another: str) -> tuple[str, str]:
    """Return the cause of a failed connection attempt, and a remedy.

    ``another`` is the part of the remedy that advises the user to try another address.
    """
    text = str(reason)
    if isinstance(reason, nats.errors.AuthorizationError) or re.search("authoriz|authentic", text, re.IGNORECASE):
        return _login_refused(settings, text)
    if denied_subject(reason) is not None:
        return text.removeprefix("nats: "), _PERMISSIONS
    if isinstance(reason, ssl.SSLError):
        return _no_tls(settings, reason)
    if isinstance(reason, nats.errors.SecureConnWantedError):
        return (
            "the server does not support TLS",
            "enable TLS on the server, or use an address with nats:// and no TLS settings",
        )
    if isinstance(reason, socket.gaierror):
        return "the host name is unknown", "check its spelling"
    if isinstance(reason, DetachedServerDown):
        return "your detached server is not running", another
    if isinstance(reason, ConnectionRefusedError) or re.search("refused|connect call failed", text, re.IGNORECASE):
        return "the connection was refused", another
    if isinstance(reason, Silent):
        why = f"the server accepted the connection but did not answer within {settings.connect_timeout:g} s"
        return why, f"{_TLS_FIRST_REMEDY[settings.tls_first]}; {another}"
    if isinstance(reason, (TimeoutError, asyncio.TimeoutError)):
        return f"the server did not answer within {settings.connect_timeout:g} s", another
    if isinstance(reason, CertificateRefused):
        why = "refused the client certificate" if settings.tls_cert else "requires a client certificate"
        return f"the server {why}", _CERTIFICATE_REMEDY
    if isinstance(reason, (nats.errors.UnexpectedEOF, ConnectionResetError)) or "expecting INFO" in text:
        return (
            "the server closed the connection, or is not a NATS server",
            f"{_TLS_FIRST_REMEDY[settings.tls_first]}; {another}",
        )
    return text.removeprefix("nats: ").strip("'") or type(reason).__name__, another


def _login_refused(settings: Settings, text: str) -> tuple[str, str]:
    remedy = "the address is correct"
    if "expired" in text:
        return "the credentials have expired", f"request new credentials; {remedy}"
    if settings.creds is not None:
        why = f"the server refused the credentials file {str(settings.creds)!r}"
        return why, f"check the file and its expiry date; {remedy}"
    if settings.nkey is not None:
        return "the server refused the nkey", f"check that the server knows the nkey's public key; {remedy}"
    given = any(each is not None for each in (settings.user, settings.password, settings.token))
    return "the server refused the login", f"check user, password or token{'' if given else ' (none is set)'}; {remedy}"


def _no_tls(settings: Settings, reason: ssl.SSLError) -> tuple[str, str]:
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message
        if reason.verify_code in _UNKNOWN_AUTHORITY:
            return (
                f"the server's certificate is not signed by a trusted authority ({why})",
                "set tls_ca to the authority's certificate file",
            )
        if "mismatch" in why.lower() or "valid for" in why.lower():
            return (
                f"the server's certificate is for another host ({why})",
                "use a host name that is listed in the certificate",
            )
        return (
            f"the server's certificate is not valid ({why})",
            "renew the certificate, or check the clocks of both machines",
        )
    name = (reason.reason or str(reason)).upper()
    if "CERTIFICATE_REQUIRED" in name or ("HANDSHAKE_FAILURE" in name and not settings.tls_cert):
        return "the server requires a client certificate", _CERTIFICATE_REMEDY
    if "ALERT" in name and ("CERTIFICATE" in name or "UNKNOWN_CA" in name):
        return f"the server refused the client certificate ({name.replace('_', ' ').lower()})", _CERTIFICATE_REMEDY
    if settings.tls_first and ("WRONG_VERSION" in name or "RECORD_LAYER" in name or "PACKET_LENGTH" in name):
        return "the server does not expect the TLS handshake first", "remove tls_first"
    return f"TLS failed ({name.replace('_', ' ').lower()})", "check the TLS settings of the client and the server"


def _without_secrets(text: str, settings: Settings) -> str:
    """Remove the secrets of the settings from a message. The messages of other libraries may contain secrets."""
    for secret in (settings.password, settings.token, settings.nkey):
        if secret:
            text = text.replace(str(secret), "…")
    return text


def address(settings: Settings) -> str:
    """Return the server's addresses as text without secrets."""
    return ", ".join(settings.urls)
