"""Connection settings: addresses, credentials, TLS, bucket names and timeouts, in one immutable object.

Some settings can also be read from environment variables or from a NATS CLI context. Contexts are files in
``$XDG_CONFIG_HOME/nats``. If that variable is not set, the folder is ``~/.config/nats`` on every operating system. Each
context is stored in ``context/NAME.json``, and ``context.txt`` contains the name of the selected context. nqnb reads
these files in the same way as jsm.go's package ``natscontext``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from nqnb.error_text import exact_text, hint, kind_of, shown
from nqnb.errors import BadInput
from nqnb.inputs import Duration, check_count, check_flag, check_seconds
from nqnb.protocol import names

DEFAULT_URL = "nats://127.0.0.1:4222"
QUEUE_BUCKET = "nq-queues"
SCHEDULE_BUCKET = "nq-schedules"
BUCKETS = (
    "state_bucket",
    "cancel_bucket",
    "worker_bucket",
    "result_bucket",
    "queue_bucket",
    "schedule_bucket",
    "limit_bucket",
)
"""The settings that name the buckets."""
WEEK = 7 * 86_400.0
SHORTEST_ACK_WAIT_SECONDS, LONGEST_ACK_WAIT_SECONDS = 0.01, 30 * 86_400
"""The limits of ``ack_wait``. Leases are renewed three times per ack wait, and states are kept for at least ten
ack waits."""
_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,200}")

_MAX_CONTEXT_CHARACTERS = 200
"""The maximum length of the name of a context. The name is part of a file name."""

_FILES = ("creds", "tls_ca", "tls_cert", "tls_key")
_TLS = ("tls_ca", "tls_cert", "tls_key", "tls_first")
_VARIABLES = {
    "url": "NATS_URL",
    "user": "NATS_USER",
    "password": "NATS_PASSWORD",
    "token": "NATS_TOKEN",
    "creds": "NATS_CREDS",
    "nkey": "NATS_NKEY",
    "tls_ca": "NATS_CA",
    "tls_cert": "NATS_CERT",
    "tls_key": "NATS_KEY",
}

_SCHEMES = ("nats", "tls", "ws", "wss")
_WEB_PORTS = {"ws": 80, "wss": 443}
"""The default ports of the schemes whose default port is not 4222."""
_SEED = re.compile(r"S[A-Z2-7]{57}")
_LONGEST_SHOWN_PATH = 300
_FILE_CONTENTS = re.compile(r"[\r\n]|-----BEGIN|[A-Za-z0-9]{50,}|^eyJ|^LS0t")
"""A pattern for text that is probably not a path: several lines, a PEM header, a seed or a JWT, possibly in Base64."""

LOGINS = (("user", "password", "token"), ("creds",), ("nkey",))
"""The settings for each kind of login, in the NATS CLI's order of precedence. Only one kind is used."""

_CONTEXT_FIELDS = {
    "url": "url",
    "user": "user",
    "password": "password",
    "token": "token",
    "creds": "creds",
    "nkey": "nkey",
    "ca": "tls_ca",
    "cert": "tls_cert",
    "key": "tls_key",
    "tls_first": "tls_first",
}
"""A map from the fields of a NATS CLI context to the fields of `Settings`."""

_CONTEXT_PATHS = ("creds", "nkey", "ca", "cert", "key")

_UNSUPPORTED_FIELDS = (
    "nsc",
    "user_jwt",
    "socks_proxy",
    "inbox_prefix",
    "jetstream_domain",
    "jetstream_api_prefix",
    "windows_cert_store",
)
"""Unsupported context fields that select the server or the login. Ignoring them could lead to the wrong server."""

_REFERENCES = ("op://", "nsc://", "env://", "data:")
"""Prefixes of context values that refer to other sources. Newer versions of the NATS CLI support such values."""


@dataclass
class _Source:
    """A source of settings: the arguments, the environment or a context.

    Attributes:
        label: a function that returns the name of a setting in this source, for error messages.
        values: a dict of the settings in this source. The keys are the names in `Settings`.
    """

    label: Callable[[str], str]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """Settings for the connection to NATS, and for the streams and buckets that nqnb creates.

    Addresses, logins and TLS settings that are not passed are read from the NATS CLI's environment variables
    (``NATS_URL`` …) and then from a NATS CLI context. A context that is passed is read before the variables, and
    ``NATS_URL`` is then ignored. A login is a user and password, a token, a credentials file or an nkey. The whole
    login is taken from the first source that has a login. Only a missing user name or password is looked up in later
    sources.

    Args:
        url: one address, or several addresses of one cluster. The default scheme is ``nats://``; the scheme ``tls://``
            requires TLS. The login in an address is moved to ``user`` and ``password``, or to ``token``, so that the
            stored address has no secrets. Without a port, the port is 80 for ``ws://``, 443 for ``wss://`` and
            otherwise 4222. Default: the address in ``context`` if a context is passed, or else ``NATS_URL``, or else
            the address in the default context, or else ``nats://127.0.0.1:4222``.
        user: user name; default ``NATS_USER``. Without a password, the user name is used as a token, as in the NATS
            CLI.
        password: password; default ``NATS_PASSWORD``.
        token: token; default ``NATS_TOKEN``.
        creds: path of a credentials file, with a JWT and a seed; default ``NATS_CREDS``. The file is read again
            for each connection.
        nkey: path of a file with the seed of an nkey, or the seed itself; default ``NATS_NKEY``. The file is read again
            for each connection.
        tls_ca: path of a PEM file with the trusted certificate authorities; default ``NATS_CA``, or else the system's
            authorities. If any TLS setting is set, TLS is required: no credentials are sent to a server without TLS.
        tls_cert: path of the client certificate, a PEM file; default ``NATS_CERT``. The files of all TLS settings are
            read again for each connection.
        tls_key: path of the certificate's private key, a PEM file without a passphrase; default ``NATS_KEY``.
        tls_first: whether the TLS handshake takes place before the server sends its first message.
        context: name of the NATS CLI context to read. Default: ``NATS_CONTEXT``, or else the selected context unless
            ``NATS_URL`` is set. If ``url`` is passed, no context is read by default. After initialization, this
            attribute is the name of the context that was read.
        name: the name of this connection in the server's monitoring.
        replicas: the number of replicas of each stream and bucket that nqnb creates, from 1 to 5. If the state bucket
            has more replicas, the new streams and buckets have as many as the state bucket.
        state_bucket: the key-value bucket for the states of tasks. All clients and workers of a queue must use the same
            bucket.
        cancel_bucket: the bucket for cancel requests.
        worker_bucket: the bucket for the presence entries of workers.
        result_bucket: the bucket for results that are too large for the state bucket.
        queue_bucket: the bucket for the names of paused queues. It is created when a queue is first paused.
        schedule_bucket: the bucket for the schedules of recurring tasks. It is created with the first schedule.
        limit_bucket: the bucket for the limits of queues, and for serial keys. The bucket is created when the first
            limit is set or the first task with a serial key is submitted.
        retention: how long to keep the states and results of ended tasks, in seconds or as a timedelta. The default is
            7 days; None keeps them indefinitely. The minimum is an hour or ten ack waits, whichever is longer, and
            smaller values are raised to the minimum. From version 2.11 on, the server deletes expired states and
            results. On older servers, and for cancel requests, use `Client.prune`. A state must outlive its task's
            message: if a worker dies between writing an outcome and acking, the message remains in the queue. If the
            state expires before a worker receives the message, the task runs again.
        ack_wait: how long a worker may be silent before the server redelivers its task to another worker, in seconds or
            as a timedelta, from 0.01 s to 30 days. This setting applies only to consumers that nqnb creates; existing
            consumers keep their ack wait.
        connect_timeout: the time limit for the first connection, in seconds or as a timedelta.
        request_timeout: the time limit for each answer from the server, in seconds or as a timedelta.
        retry_for: how long to retry idempotent requests while the server is unavailable or electing a leader, in
            seconds or as a timedelta.

    Raises:
        BadInput: an address, a number, a name, a file or a context is invalid.

    Examples:
        >>> settings = nqnb.Settings("nats://127.0.0.1:4222", token="secret", retention=3600)
        >>> nqnb.connect(settings, ack_wait=10)
        <Client nats://127.0.0.1:4222, closed>
    """

    url: str | Sequence[str] = ""
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds: str | os.PathLike[str] | None = None
    nkey: str | os.PathLike[str] | None = field(default=None, repr=False)
    tls_ca: str | os.PathLike[str] | None = None
    tls_cert: str | os.PathLike[str] | None = None
    tls_key: str | os.PathLike[str] | None = None
    tls_first: bool = False
    context: str | None = None
    name: str = "nqnb"
    replicas: int = 1
    state_bucket: str = names.STATE_BUCKET
    cancel_bucket: str = names.INTENT_BUCKET
    worker_bucket: str = names.PRESENCE_BUCKET
    result_bucket: str = names.RESULT_BUCKET
    queue_bucket: str = QUEUE_BUCKET
    schedule_bucket: str = SCHEDULE_BUCKET
    limit_bucket: str = names.LIMIT_BUCKET
    retention: Duration | None = WEEK
    ack_wait: float = 30.0
    connect_timeout: float = 5.0
    request_timeout: float = 5.0
    retry_for: float = 15.0
    named: bool = field(default=True, init=False, repr=False, compare=False)
    """Whether the address comes from an argument, the environment or a context. If not, it is the default address."""
    detached: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the address is that of the user's detached server. This address is looked up again at each reconnect."""
    isolated: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether these settings, and copies of them with other options, ignore the environment and the contexts."""

    def __post_init__(self) -> None:
        self._resolve(_VARIABLES)

    def _resolve(self, variables: Mapping[str, str]) -> None:
        self._check_values()
        sources = self._sources(variables)
        addresses = next((source.values["url"] for source in sources if "url" in source.values), ())
        object.__setattr__(self, "named", bool(addresses))
        addresses = addresses or (DEFAULT_URL,)
        resolved = {name: None for kind in LOGINS for name in kind} | _find_login(sources)
        for name in _TLS:
            resolved[name] = next((source.values[name] for source in sources if name in source.values), None)
        for name in (*_FILES, "nkey"):
            if resolved[name] is not None:
                label = next(source.label(name) for source in sources if name in source.values)
                resolved[name] = (_check_nkey if name == "nkey" else _check_readable)(label, resolved[name])
        if resolved["tls_key"] and not resolved["tls_cert"]:
            raise BadInput("tls_key cannot be used alone: the key requires a certificate. Set tls_cert as well.")
        resolved["tls_first"] = bool(resolved["tls_first"])
        resolved["url"] = addresses[0] if len(addresses) == 1 else addresses
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _sources(self, variables: Mapping[str, str]) -> list[_Source]:
        """Collect the settings in the arguments, the environment and the context, and parse the addresses."""
        given = {name: getattr(self, name) for kind in (*LOGINS, _TLS) for name in kind}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        arguments = _Source(lambda name: name, given | ({"url": self.url} if self.url else {}))
        environment = _read_environment(variables)
        if self.context:
            # Ignore NATS_URL and the login in it. The caller chose the context's server, and NATS_URL may name another.
            context: str | None = self.context
            environment.values.pop("url", None)
            sources = [arguments, _read_context(self.context), environment]
        else:
            context = None if self.url else os.environ.get("NATS_CONTEXT") or None
            if context is None and not self.url and "url" not in environment.values:
                context = _selected_context()
            sources = [arguments, environment, *([_read_context(context)] if context else [])]
        object.__setattr__(self, "context", context)
        found = False
        for source in sources:
            if "url" in source.values:
                # Only the first source's address is used. A login in another address belongs to another server.
                source.values["url"], login = _parse_addresses(source.values["url"], source.label("url"))
                if not found:
                    _add_login(source.values, login)
                found = True
        return sources

    def _check_values(self) -> None:
        object.__setattr__(self, "url", _plain_url(self.url))
        for name in ("user", "password", "token", "context", "name"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "name"):
                # The value may be a secret.
                raise BadInput(f"{name} is invalid: expected a string, got {kind_of(value)}.")
            if value is not None:
                object.__setattr__(self, name, exact_text(value))
        for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _path(name, value))
        numbers: dict[str, object] = {
            "replicas": check_count("replicas", self.replicas, 1, 5, "the number of servers that store a copy"),
            "tls_first": check_flag("tls_first", False if self.tls_first is None else self.tls_first),
            "retention": check_seconds("retention", self.retention, positive=True, none=True),
            "ack_wait": check_seconds(
                "ack_wait", self.ack_wait, least=SHORTEST_ACK_WAIT_SECONDS, most=LONGEST_ACK_WAIT_SECONDS
            ),
        }
        for name in ("connect_timeout", "request_timeout", "retry_for"):
            numbers[name] = check_seconds(name, getattr(self, name), positive=True)
        for name, number in numbers.items():
            object.__setattr__(self, name, number)
        buckets: dict[str, str] = {}
        for name in BUCKETS:
            bucket = getattr(self, name)
            if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
                raise BadInput(
                    f"{name}={shown(bucket)} is invalid: expected 1 to 200 characters, each a letter (A-Z, a-z), "
                    "digit, hyphen or underscore."
                )
            object.__setattr__(self, name, bucket := exact_text(bucket))
            if bucket in buckets:
                raise BadInput(
                    f"{name}={bucket!r} is invalid: {buckets[bucket]} has the same value. "
                    "Use a different name for each bucket."
                )
            buckets[bucket] = name

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses of the servers, without secrets."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def retention_seconds(self) -> float | None:
        """``retention`` in seconds, or None for no limit."""
        return check_seconds("retention", self.retention, none=True)

    @classmethod
    def of(cls, settings: Settings | str | Sequence[str] | None, **options: Any) -> Settings:
        """Create settings from existing settings, from an address, or from the defaults (None).

        Most options replace a single setting. An option that is part of a login replaces the whole login. The option
        ``context`` replaces the address, the login and the TLS settings.

        Raises:
            BadInput: an option is unknown, or a value is invalid.
        """
        known = {setting.name for setting in fields(cls) if setting.init}
        unknown, listed = sorted(set(options) - known), ", ".join(sorted(known))
        if unknown:
            raise BadInput(
                f"setting {unknown[0]!r} is invalid: there is no such setting. "
                f"{hint(unknown[0], known)}The settings are {listed}."
            )
        if not isinstance(settings, cls):
            return cls(**{**({} if settings is None else {"url": settings}), **options})
        if not options:
            return settings  # new settings could differ, because the environment or the context may have changed
        given = {name: getattr(settings, name) for name in known}
        logins = [name for kind in LOGINS for name in kind]
        replaced: Iterable[str] = ()
        if options.get("context") is not None:
            replaced = ("url", *logins, *_TLS)
        elif any(options.get(name) is not None for name in logins) or _names_login(_plain_url(options.get("url"))):
            replaced = logins
        kept = {**{name: value for name, value in given.items() if name not in replaced}, **options}
        isolated = settings.isolated and kept.get("url") and kept.get("context") is None
        made = cls.local(**kept) if isolated else cls(**kept)
        if not settings.named and "url" not in options and options.get("context") is None:
            object.__setattr__(made, "named", False)
        if settings.detached and made.url == settings.url and made.token == settings.token:
            object.__setattr__(made, "detached", True)
        return made

    @classmethod
    def local(cls, url: str | Sequence[str], **options: Any) -> Settings:
        """Create settings for a server that nqnb started, or recreate settings that another process resolved.

        No environment variable or context is read, because the user's variables may belong to another server.

        Args:
            url: the address of the server, or several addresses of one cluster.
            **options: fields of the settings.

        Raises:
            BadInput: a value is invalid.
        """
        made = object.__new__(cls)
        for each in fields(cls):
            object.__setattr__(made, each.name, options.get(each.name, each.default))
        object.__setattr__(made, "url", url)
        object.__setattr__(made, "isolated", True)
        made._resolve({})
        return made

    def at_detached(self, url: str, token: str) -> Settings:
        """Return a copy of these settings with the address and token of the user's detached server."""
        made = Settings.of(self, url=url, token=token)
        object.__setattr__(made, "detached", True)
        return made


def _names_login(url: object) -> bool:
    """Return whether an address, or one of several addresses, contains a login. Invalid values are rejected later."""
    texts = [url] if isinstance(url, str) else url if isinstance(url, (list, tuple)) else []
    return any(isinstance(text, str) and "@" in text for text in texts)


def _plain_url(url: object) -> str | tuple[object, ...]:
    """Convert one or more addresses to plain strings. Errors do not show addresses, which may contain secrets."""
    if url is None:
        return ""
    if isinstance(url, str):
        return exact_text(url)
    if isinstance(url, Sequence) and not isinstance(url, (bytes, bytearray, memoryview, range)):
        with contextlib.suppress(Exception):  # a custom sequence may raise any error
            several = tuple(exact_text(item) if isinstance(item, str) else item for item in url)
            if several:
                return several
    is_empty = isinstance(url, (list, tuple)) and not url
    why = "the list of addresses is empty" if is_empty else f"expected one or more addresses, got {kind_of(url)}"
    raise BadInput(f"url is invalid: {why}. Pass an address like {DEFAULT_URL}.")


def _path(name: str, value: object) -> str:
    """Return a path as a string. Errors do not show the value, which may be a secret that was passed by mistake."""
    path: object = None
    if isinstance(value, (str, os.PathLike)):
        with contextlib.suppress(Exception):  # a custom `__fspath__` may raise any error
            path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise BadInput(f"{name} is invalid: expected a path to a file, got {kind_of(value)}. Pass a path, or None.")
    return exact_text(path)


def _read_environment(variables: Mapping[str, str]) -> _Source:
    """Return the settings from the nonempty environment variables. ``variables`` maps settings to their variables."""
    values = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    return _Source(variables.__getitem__, values)


def _selected_context() -> str | None:
    """Return the name of the selected NATS CLI context, or None. Raise `BadInput` if the file cannot be read."""
    path = _folder() / "context.txt"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read the name of the selected NATS context from {str(path)!r}: {_why(error)}. "
            "Repair or remove the file, or set an address with --url or NATS_URL."
        ) from None


def _read_context(name: str) -> _Source:
    """Return the settings in a NATS CLI context.

    Raises:
        BadInput: the context does not exist, cannot be read, or uses a field that nqnb does not support.
    """
    impossible = not isinstance(name, str) or not name or len(name) > _MAX_CONTEXT_CHARACTERS
    if impossible or ".." in name or "/" in name or os.sep in name:
        raise BadInput(
            f"NATS context name {shown(name)} is invalid: a name must not be empty, contain '/' or '..', or have more "
            f"than {_MAX_CONTEXT_CHARACTERS} characters. List your contexts with `nats context ls`."
        )
    path = _folder() / "context" / f"{name}.json"
    where = f"NATS context {name!r} ({path})"
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        raise BadInput(
            f"{where} was not found: the file does not exist. List your contexts with `nats context ls`, or set an "
            "address."
        ) from None
    except (OSError, ValueError) as error:
        # The error of the parser may quote a password, so only the position is shown.
        raise BadInput(
            f"{where} cannot be read: {_why(error)}. Repair the file with `nats context edit {name}`."
        ) from None
    repair = f"Edit the context with `nats context edit {name}`, or set the address and credentials instead."
    for key in _UNSUPPORTED_FIELDS:
        if found.get(key):
            raise BadInput(f"{where} is invalid: nqnb does not support {key!r}. {repair}")
    values: dict[str, Any] = {}
    for key, target in _CONTEXT_FIELDS.items():
        value = found.get(key)
        if value is None or value in ("", False):
            continue
        if not isinstance(value, bool if key == "tls_first" else str):
            raise BadInput(
                f"{where} is invalid: {key!r} must be {'true or false' if key == 'tls_first' else 'a string'}. {repair}"
            )
        if isinstance(value, str) and value.lower().startswith(_REFERENCES):
            raise BadInput(f"{where} cannot be used: only the NATS CLI can look up the value of {key!r}. {repair}")
        values[target] = _expanded(value) if key in _CONTEXT_PATHS and isinstance(value, str) else value
    names_there = {target: key for key, target in _CONTEXT_FIELDS.items()}
    return _Source(lambda target: f"{names_there[target]!r} of {where}", values)


def _folder() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home, "nats")


def _expanded(value: str) -> str:
    return os.path.expanduser(os.path.expandvars(value.removeprefix("file://")))


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _parse_addresses(given: object, label: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the addresses without logins, and the first login that is found in an address.

    ``label`` names the source of the addresses in errors. Errors do not quote an address, because an invalid address
    may contain a password at any position.
    """
    if not isinstance(given, (str, Sequence)):
        raise BadInput(
            f"url is invalid: expected one or more addresses, got {kind_of(given)}. Use an address like {DEFAULT_URL}."
        )
    urls: list[str] = []
    login: dict[str, str] = {}
    texts = given.split(",") if isinstance(given, str) else given
    if isinstance(given, str) and any(map(_may_be_one_address, texts, texts[1:])):
        raise BadInput(
            f"{label} is invalid: its comma is ambiguous. The comma could separate two addresses or be part of a "
            f"password. Write commas in passwords as %2C, and write each address in full, like {DEFAULT_URL}."
        )
    for number, address in enumerate(texts, 1):
        parts, problem = _split(address.strip() if isinstance(address, str) else "")
        if parts is None:
            which = label if len(texts) == 1 else f"address {number} of {len(texts)} in {label}"
            raise BadInput(f"{which} is invalid: {problem}. Use an address like {DEFAULT_URL}.")
        user, password = (None if part is None else unquote(part) for part in (parts.username, parts.password))
        if user is not None and not login:
            login = {"token": user} if password is None else {"user": user, "password": password}
        host = f"[{parts.hostname}]" if ":" in f"{parts.hostname}" else parts.hostname
        port = parts.port or _WEB_PORTS.get(parts.scheme, 4222)
        urls.append(f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}")
    return tuple(urls), login


def _may_be_one_address(before: str, after: str) -> bool:
    """Return whether the parts before and after a comma may be one address whose password contains the comma.

    If both parts have the same login, they are two addresses.
    """
    one, other = (text.strip().rpartition("://")[2].rpartition("@")[:2] for text in (before, after))
    return "@" in after and "://" not in after and one != other


def _split(text: str) -> tuple[SplitResult | None, str]:
    """Split an address into its parts.

    If the address is invalid, return None and a description of the problem. The description does not quote the address.
    """
    try:
        parts = urlsplit(text if "://" in text else f"nats://{text}")
    except ValueError:
        return None, "it has no host"
    rest = f"{parts.path.rstrip('/')}{parts.query}{parts.fragment}"
    # In urllib, an unescaped slash ends the host, even if the slash is part of a password.
    if "@" in rest:
        return None, "the characters / ? # in a password must be written as %2F %3F %23"
    if parts.scheme not in _SCHEMES:
        return None, f"it must begin with one of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
    if not parts.hostname:
        return None, "it has no host"
    try:
        _ = parts.port
    except ValueError:
        return None, "its port must be a number up to 65535, and a password must be followed by @ and the host"
    # If the host is missing, a password is parsed as the port, and the text after a slash in it as the path.
    if rest and parts.scheme in ("nats", "tls"):
        return None, "only ws:// and wss:// have a path, and / ? # in a password must be written as %2F %3F %23"
    return parts, ""


def _add_login(values: dict[str, Any], login: dict[str, str]) -> None:
    """Add the login in an address to the settings from the same source, unless these settings have another login."""
    named = {name for kind in LOGINS for name in kind if name in values}
    if named == {"password"} and "token" in login:
        values["user"] = login["token"]
    elif not named:
        values.update(login)


def _find_login(sources: Sequence[_Source]) -> dict[str, Any]:
    """Return the login from the first source that has a login."""
    for depth, source in enumerate(sources):
        kinds = [kind for kind in LOGINS if any(name in source.values for name in kind)]
        if depth == 0 and len(kinds) > 1:
            first, second = (next(name for name in kind if name in source.values) for kind in kinds[:2])
            raise BadInput(
                f"{first} and {second} cannot be combined: each specifies how to log in. Pass only one of them."
            )
        if kinds:
            found = {name: source.values[name] for name in kinds[0] if name in source.values}
            if kinds[0] == LOGINS[0] and "token" not in found:
                _complete(found, sources[depth + 1 :])
            return found
    return {}


def _complete(found: dict[str, Any], sources: Sequence[_Source]) -> None:
    """Look up a missing user name or password in later sources. A user name without a password becomes a token."""
    for source in sources:
        user, password = (source.values.get(name) for name in ("user", "password"))
        if "user" not in found and user is not None:
            found["user"] = user
        if "password" not in found and password is not None and user in (None, found.get("user")):
            found["password"] = password
    if found.get("user") and "password" not in found:
        found["token"] = found.pop("user")


def _check_readable(label: str, path: str | os.PathLike[str]) -> str:
    """Check that a file can be read, and return its path. ``label`` names the setting in the error."""
    path = os.path.expanduser(path)
    try:
        with open(path, "rb"):
            return path
    except (OSError, ValueError) as error:
        if _may_be_contents(path):
            raise BadInput(
                f"{label} is invalid: the value looks like the contents of a file, so it is not shown here. "
                "Set it to the path of the file instead."
            ) from None
        why = getattr(error, "strerror", None) or error
        raise BadInput(
            f"{label} {path!r} is invalid: the file cannot be read ({why}). Check the path and the file's permissions."
        ) from None


def _may_be_contents(path: str) -> bool:
    """Return whether a path looks like file contents that were passed by mistake. Such contents may be secret."""
    return len(path) > _LONGEST_SHOWN_PATH or _FILE_CONTENTS.search(path) is not None


def _check_nkey(label: str, given: str | os.PathLike[str]) -> str:
    """Check that a value is the seed of an nkey or the path of a readable file, and return the seed or path."""
    text = os.path.expanduser(os.fspath(given).strip())
    if _SEED.fullmatch(text):
        return text
    if os.path.isfile(text):
        return _check_readable(label, text)
    # The value may be a mistyped seed, so it is shown only if it is clearly a path.
    value = f" {text!r}" if (os.sep in text or "." in text) and not _may_be_contents(text) else ""
    raise BadInput(
        f"{label}{value} is invalid: it is neither a seed nor a readable file. "
        "Use a seed (58 characters, starting with SU) or the path of a file that contains a seed."
    )
