"""Foreign errors turned into ours, in this one place."""

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

NO_JETSTREAM_CODES = (10039, 10076)
"""JetStream is not enabled for the account, or on the server."""

STREAM_FULL = 10077
"""JetStream's number for what one stream cannot store, because of its own limits among others."""
_NOT_NOW = {
    **dict.fromkeys((10007, 10008, 10009), "JetStream has no leader at this moment"),
    **dict.fromkeys(NO_JETSTREAM_CODES, "JetStream is off at this moment"),
    10004: "some servers of the cluster did not answer",
    10041: "the servers of the cluster do not agree at this moment",
    10075: "the cluster is moving the stream",
    STREAM_FULL: "the stream cannot store anything at this moment",
    10118: "the servers that have the stream are offline",
    10119: "the servers that have the consumer are offline",
    10163: "an earlier write of the same key is still under way",
}
"""JetStream's numbers for "not now", and what each means. None of them says that the request itself is wrong."""
_NO_PEERS = 10005
"""No servers for a stream's replicas: "not now" where some are offline, else a setting that asks for too many."""
_LIMITS = {
    10002: "the account's storage limit",
    10023: "the server's storage limit (max_file_store or max_memory_store)",
    10028: "the memory limit (max_memory_store, or the account's)",
    10047: "the storage limit (max_file_store, or the account's)",
}
"""JetStream's numbers for a storage limit that is reached, and which one that is."""
_FULL = re.compile("maximum (bytes|messages)|no space|disk", re.IGNORECASE)
"""What 10077 says where its stream or the disk is full."""

_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
"""OpenSSL's numbers for a chain that ends at nobody whom we trust."""
_OUR_CERTIFICATE = "give the certificate and key that it accepts with tls_cert and tls_key"
_PERMISSIONS = "ask its operator for the permissions that nqnb's README lists"
_FIRST = {
    False: "if it wants the TLS handshake first, give tls_first",
    True: "if it does not want the TLS handshake first, leave tls_first out",
}


class ApiError(msgspec.Struct):
    """An error as the JetStream API writes it."""

    code: int = 0
    err_code: int = 0
    description: str = ""


def translated(error: nats.errors.Error, settings: Settings, subject: str) -> ConnectionFailed:
    """What nats-py raises while the connection is used."""
    if isinstance(error, nats.errors.OutboundBufferLimitError):
        return NoResponders(f"the connection to {address(settings)} is away, and its buffer is full", subject)
    if isinstance(error, nats.errors.ConnectionClosedError):
        return ConnectionFailed(f"the connection to {address(settings)} is closed; connect again")
    return ConnectionFailed(f"the connection to {address(settings)} cannot be used now: {error}")


def refused(error: ApiError, what: str) -> ServerRefused | Unavailable:
    """Return the error for what the JetStream API answered.

    Args:
        error: the answer.
        what: what was asked, such as "storing a message on 'q.task'".
    """
    facts = (error.code, error.err_code, error.description)
    told = f"{error.description}, code {error.err_code or error.code}"
    limit = _LIMITS.get(error.err_code)
    if error.err_code == STREAM_FULL and (found := _FULL.search(error.description)):
        limit = f"the stream's limit of {found[1]}" if found[1] else "the server's disk"
    if limit is not None:
        return NoRoom(
            f"{what} failed: {limit} is reached ({told}). "
            "Free room with `nqnb prune` or `nqnb queue purge QUEUE`, or raise the limit.",
            what,
            *facts,
        )
    why = _NOT_NOW.get(error.err_code)
    if error.err_code == _NO_PEERS and "offline" in error.description:
        why = "too many servers of the cluster are offline"
    if why is None and error.code == 503 and not error.err_code:
        why = "JetStream is not available at this moment"
    if why is not None:
        return Unavailable(
            f"{what} failed: {why} ({told}). "
            "Check that a majority of the cluster's servers runs (`nats server report jetstream`), then try again.",
            what,
            *facts,
        )
    return ServerRefused(
        f"the server refused {what}: {error.description} (code {error.err_code or error.code})", *facts
    )


def denied_subject(error: BaseException) -> tuple[str, str] | None:
    """What a user may not do, "publish" or "subscribe", and to which subject; None where it is about something else."""
    found = re.search(r'permissions violation for (publish|subscription) to "([^"]+)"', str(error), re.IGNORECASE)
    return None if found is None else ("publish" if found[1].lower() == "publish" else "subscribe", found[2])


def not_permitted(settings: Settings, verb: str, subject: str) -> ServerRefused:
    """Our user lacks a permission, which the server says beside the answers, and only there."""
    who = f"user {settings.user!r}" if settings.user else "our user"
    text = f"{who} may not {verb} to {subject!r}"
    return ServerRefused(f"the server refused a request: {text}; {_PERMISSIONS}", 403, 0, text)


class Silent(TimeoutError):
    """The address took our connection, and said nothing."""


class CertificateRefused(ConnectionError):
    """The server wants a certificate, and hung up on ours or for want of one."""


def no_server(settings: Settings, reasons: Mapping[str, BaseException]) -> NoServer:
    """Why no address would have us, with the remedies; ``reasons`` has what happened, by address."""
    where = address(settings)
    told: dict[str, list[str]] = {}
    for url in settings.urls:
        if url in reasons:
            told.setdefault(_without_secrets("; ".join(_reason(settings, reasons[url])), settings), []).append(url)
    if len(told) == 1:
        return NoServer(f"no NATS server at {where}: {next(iter(told))}", where)
    each = " | ".join(f"{', '.join(urls)}: {reason}" for reason, urls in told.items())
    return NoServer(f"no NATS server at any of the addresses: {each}", where)


def _reason(settings: Settings, reason: BaseException) -> tuple[str, str]:
    """What went wrong, and what to do."""
    another = "start one with `nqnb up`, or give another address with --url or NATS_URL"
    text = str(reason)
    if isinstance(reason, nats.errors.AuthorizationError) or re.search("authoriz|authentic", text, re.IGNORECASE):
        return _turned_away(settings, text)
    if denied_subject(reason) is not None:
        return text.removeprefix("nats: "), _PERMISSIONS
    if isinstance(reason, ssl.SSLError):
        return _no_tls(settings, reason)
    if isinstance(reason, nats.errors.SecureConnWantedError):
        return "it does not speak TLS", "give an address with nats:// and no TLS settings if plain text will do"
    if isinstance(reason, socket.gaierror):
        return "no host of that name is known", "check its spelling"
    if isinstance(reason, ConnectionRefusedError) or re.search("refused|connect call failed", text, re.IGNORECASE):
        return "the connection was refused", another
    if isinstance(reason, Silent):
        why = f"it took the connection, and gave no answer within {settings.connect_timeout:g} s"
        return why, f"{_FIRST[settings.tls_first]}; {another}"
    if isinstance(reason, (TimeoutError, asyncio.TimeoutError)):
        return f"no answer within {settings.connect_timeout:g} s", another
    if isinstance(reason, CertificateRefused):
        why = "refused our certificate" if settings.tls_cert else "wants a certificate of ours"
        return f"it {why}", _OUR_CERTIFICATE
    if isinstance(reason, (nats.errors.UnexpectedEOF, ConnectionResetError)) or "expecting INFO" in text:
        return "it hung up or spoke something else", f"{_FIRST[settings.tls_first]}; {another}"
    return text.removeprefix("nats: ").strip("'") or type(reason).__name__, another


def _turned_away(settings: Settings, text: str) -> tuple[str, str]:
    remedy = "nothing else is wrong with the address"
    if "expired" in text:
        return "our credentials have expired there", f"get new ones; {remedy}"
    if settings.creds is not None:
        return f"it refused our credentials file {str(settings.creds)!r}", f"check it, and whether it expired; {remedy}"
    if settings.nkey is not None:
        return "it refused our nkey", f"check that the server knows its public key; {remedy}"
    given = any(each is not None for each in (settings.user, settings.password, settings.token))
    return "it refused our user, password or token", f"check them{'' if given else ' (none was given)'}; {remedy}"


def _no_tls(settings: Settings, reason: ssl.SSLError) -> tuple[str, str]:
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message
        if reason.verify_code in _UNKNOWN_AUTHORITY:
            return f"its certificate is signed by nobody we trust ({why})", "give the authority's file with tls_ca"
        if "mismatch" in why.lower() or "valid for" in why.lower():
            return f"its certificate is that of another host ({why})", "give the address that the certificate names"
        return f"its certificate is not valid ({why})", "renew it, or check the clocks"
    name = (reason.reason or str(reason)).upper()
    if "CERTIFICATE_REQUIRED" in name or ("HANDSHAKE_FAILURE" in name and not settings.tls_cert):
        return "it wants a certificate of ours", _OUR_CERTIFICATE
    if "ALERT" in name and ("CERTIFICATE" in name or "UNKNOWN_CA" in name):
        return f"it refused our certificate ({name.replace('_', ' ').lower()})", _OUR_CERTIFICATE
    if settings.tls_first and ("WRONG_VERSION" in name or "RECORD_LAYER" in name or "PACKET_LENGTH" in name):
        return "it does not begin with the TLS handshake", "leave tls_first out"
    return f"TLS failed ({name.replace('_', ' ').lower()})", "check the TLS settings here and there"


def _without_secrets(text: str, settings: Settings) -> str:
    """The text of a foreign error, should it quote one."""
    for secret in (settings.password, settings.token, settings.nkey):
        if secret:
            text = text.replace(str(secret), "…")
    return text


def address(settings: Settings) -> str:
    """Where the server is, without secrets."""
    return ", ".join(settings.urls)
