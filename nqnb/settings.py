"""Where the server is and how to speak with it, as one frozen value."""

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

QUEUE_BUCKET = "nq-queues"
WEEK = 7 * 86_400.0
SHORTEST_ACK_WAIT_SECONDS, LONGEST_ACK_WAIT_SECONDS = 0.01, 30 * 86_400
"""A lease is renewed every third of the ack wait, and what ended is kept for ten ack waits at least."""
_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,200}")

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


@dataclass(frozen=True)
class Settings:
    """How to reach a NATS server and what to create there.

    What is not given comes from the environment, by the NATS CLI's names (``NATS_URL`` …), then from a context of the
    NATS CLI, then from the defaults. Who we are comes as a whole from the first of these that says so: a user and
    password (or a token), a credentials file, or an nkey.

    Args:
        url: one address or several of one cluster; without a scheme ``nats://`` is meant. A user and password (or a
            token) inside it are taken out of it and kept aside, so that it can be shown. ``tls://`` insists on TLS.
            Default: ``NATS_URL``, else the context's, else ``nats://127.0.0.1:4222``.
        user: user name; default ``NATS_USER``. Without a password it is a token, as in the NATS CLI.
        password: password; default ``NATS_PASSWORD``.
        token: token; default ``NATS_TOKEN``.
        creds: path of a credentials file (a JWT and its seed); default ``NATS_CREDS``. Read at each connect.
        nkey: path of a file with an nkey's seed, or the seed itself; default ``NATS_NKEY``.
        tls_ca: path of the PEM file with the authorities to trust; default ``NATS_CA``, else the system's. This and
            the other TLS settings insist on TLS: what does not speak it gets no credentials.
        tls_cert: path of our certificate, a PEM file; default ``NATS_CERT``.
        tls_key: path of its private key, a PEM file without a passphrase; default ``NATS_KEY``.
        tls_first: the server wants the TLS handshake before it says anything.
        context: name of a NATS CLI context for what is not given. Default: ``NATS_CONTEXT`` where no url was given,
            and the selected one where neither a url nor ``NATS_URL`` was. Afterwards, the context that was read.
        name: what the server's monitoring calls this connection.
        replicas: how many servers keep each stream and bucket that nqnb creates, 1 to 5.
        state_bucket: key-value bucket with the tasks' states; all clients and workers of a queue share it.
        cancel_bucket: bucket with the cancels that were asked for.
        worker_bucket: bucket in which workers say that they live.
        result_bucket: bucket with results that are too large for the state bucket.
        queue_bucket: bucket that says which queues are paused; made with the first pause.
        retention: for how long the states and results of ended tasks are kept: seconds or a timedelta, default 7 days;
            None keeps them for ever. It is never less than an hour or ten ack waits, whatever is given here. Servers
            from 2.11 on remove them by themselves, for others (and for the intents of cancels) there is
            `Client.prune`. A state must outlive its task's message: a worker that dies in the moment between writing
            an outcome and answering for it leaves the message behind, and should nobody serve the queue until the
            state has expired, the task runs again.
        ack_wait: how long the server waits for a silent worker before it gives its task to another one; used where
            nqnb creates the consumer, an existing one keeps its own. Seconds or a timedelta, 0.01 s to 30 days.
        connect_timeout: how long the first connection may take: seconds or a timedelta.
        request_timeout: how long to wait for one answer of the server, likewise.
        retry_for: how long what can safely be asked again is asked again, while the server is away or elects a leader,
            likewise.

    Raises:
        BadInput: an address, a number, a name, a file or a context that cannot be used.
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
    retention: Duration | None = WEEK
    ack_wait: float = 30.0
    connect_timeout: float = 5.0
    request_timeout: float = 5.0
    retry_for: float = 15.0
    named: bool = field(default=True, init=False, repr=False, compare=False)
    """Whether an argument, the environment or a context says where the server is; else it is the default."""

    def __post_init__(self) -> None:
        self._check_values()
        sources = self._sources()
        addresses = next((source.values["url"] for source in sources if "url" in source.values), ())
        object.__setattr__(self, "named", bool(addresses))
        addresses = addresses or (DEFAULT_URL,)
        resolved = {name: None for names_ in LOGINS for name in names_} | login_of(sources)
        for name in _TLS:
            resolved[name] = next((source.values[name] for source in sources if name in source.values), None)
        for name in (*_FILES, "nkey"):
            if resolved[name] is not None:
                label = next(source.label(name) for source in sources if name in source.values)
                resolved[name] = (nkey if name == "nkey" else readable)(label, resolved[name])
        if resolved["tls_key"] and not resolved["tls_cert"]:
            raise BadInput("tls_key is given and tls_cert is not: a key is of no use without its certificate")
        resolved["tls_first"] = bool(resolved["tls_first"])
        resolved["url"] = addresses[0] if len(addresses) == 1 else addresses
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _sources(self) -> list[Source]:
        """The arguments, the environment, the context; the addresses in them are taken apart already."""
        given = {name: getattr(self, name) for names_ in (*LOGINS, _TLS) for name in names_}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        arguments = Source(lambda name: name, given | ({"url": self.url} if self.url else {}))
        environment = from_environment(_VARIABLES)
        context = self.context or (None if self.url else os.environ.get("NATS_CONTEXT") or None)
        if context is None and not self.url and "url" not in environment.values:
            context = selected()
        sources = [arguments, environment, *([load(context)] if context else [])]
        object.__setattr__(self, "context", context)
        taken = False
        for source in sources:
            if "url" in source.values:
                # Whoever is named in an address that is not used has no business at the one that is.
                source.values["url"], login = addresses_of(source.values["url"], source.label("url"))
                if not taken:
                    add_login(source.values, login)
                taken = True
        return sources

    def _check_values(self) -> None:
        object.__setattr__(self, "url", _plain_url(self.url))
        for name in ("user", "password", "token", "context", "name"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "name"):
                # The value may be a secret.
                raise BadInput(f"{name} is of type {type(value).__name__}: give a text")
            if value is not None:
                object.__setattr__(self, name, exact_text(value))
        for name in ("creds", "nkey", "tls_ca", "tls_cert", "tls_key"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _path(name, value))
        numbers: dict[str, object] = {
            "replicas": check_count("replicas", self.replicas, 1, 5, "the number of copies that NATS keeps"),
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
        for name in ("state_bucket", "cancel_bucket", "worker_bucket", "result_bucket", "queue_bucket"):
            bucket = getattr(self, name)
            if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
                raise BadInput(
                    f"{name}={shown(bucket)}: a bucket's name has 1 to 200 of the characters A-Z a-z 0-9 _ -"
                )
            object.__setattr__(self, name, bucket := exact_text(bucket))
            if bucket in buckets:
                raise BadInput(f"{name} and {buckets[bucket]} are both {bucket!r}: give each its own")
            buckets[bucket] = name

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses, without secrets."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    @property
    def retention_seconds(self) -> float | None:
        """``retention`` in seconds."""
        return check_seconds("retention", self.retention, none=True)

    @classmethod
    def of(cls, settings: Settings | str | Sequence[str] | None, **options: Any) -> Settings:
        """Settings from Settings, an address or nothing, with some fields replaced.

        An option that says who we are replaces all that said so; a context replaces the address, too.

        Raises:
            BadInput: an option that Settings does not have, or a value that cannot be used.
        """
        known = {each.name for each in fields(cls) if each.init}
        unknown, listed = sorted(set(options) - known), ", ".join(sorted(known))
        if unknown:
            raise BadInput(f"no setting is called {unknown[0]!r}. {hint(unknown[0], known)}The settings are {listed}.")
        if not isinstance(settings, cls):
            return cls(**{**({} if settings is None else {"url": settings}), **options})
        given = {name: getattr(settings, name) for name in known}
        logins = [name for names_ in LOGINS for name in names_]
        replaced: Iterable[str] = ()
        if options.get("context") is not None:
            replaced = ("url", *logins, *_TLS)
        elif any(options.get(name) is not None for name in logins) or "@" in str(_plain_url(options.get("url"))):
            replaced = logins
        made = cls(**{**{name: value for name, value in given.items() if name not in replaced}, **options})
        if not settings.named and "url" not in options and options.get("context") is None:
            object.__setattr__(made, "named", False)
        return made


def _plain_url(url: object) -> str | tuple[object, ...]:
    """An address or several of plain types; which text is an address is judged later. No error shows a part of it."""
    if url is None:
        return ""
    if isinstance(url, str):
        return exact_text(url)
    if isinstance(url, Sequence) and not isinstance(url, (bytes, bytearray, memoryview, range)):
        with contextlib.suppress(Exception):  # a stranger's sequence may fail in any way
            several = tuple(exact_text(each) if isinstance(each, str) else each for each in url)
            if several:
                return several
    raise BadInput(f"a url cannot be of {kind_of(url)}, nor be empty: write it like {DEFAULT_URL}, or give several")


def _path(name: str, value: object) -> str:
    """The text of a path, whatever gives it; it may be a secret, so that no error shows it."""
    path: object = None
    if isinstance(value, (str, os.PathLike)):
        with contextlib.suppress(Exception):  # a stranger's `__fspath__` may fail in any way
            path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise BadInput(f"{name} is no path: give that of a file, or None")
    return exact_text(path)


_FIELDS = {
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
"""What the NATS CLI calls it: what `nqnb.Settings` calls it."""

_PATHS = ("creds", "nkey", "ca", "cert", "key")

_BEYOND_US = (
    "nsc",
    "user_jwt",
    "socks_proxy",
    "inbox_prefix",
    "jetstream_domain",
    "jetstream_api_prefix",
    "windows_cert_store",
)
"""What changes whom or how we reach, and what nqnb has no setting for: ignored, it would lead elsewhere."""

_REFERENCES = ("op://", "nsc://", "env://", "data:")
"""Values that newer NATS CLIs look up elsewhere."""


@dataclass
class Source:
    """Where some settings come from.

    Attributes:
        label: for an error, what a field is called there.
        values: the fields of `nqnb.Settings` that it gives.
    """

    label: Callable[[str], str]
    values: dict[str, Any] = field(default_factory=dict)


def from_environment(variables: Mapping[str, str]) -> Source:
    """What the environment says, in ``variables`` (field: name); an empty one is not set."""
    values = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    return Source(variables.__getitem__, values)


def selected() -> str | None:
    """The name of the selected context, None where none is.

    Raises:
        BadInput: there is a selection, and it cannot be read.
    """
    path = _folder() / "context.txt"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the selected NATS context cannot be read from {str(path)!r} ({_why(error)}); repair or remove the file, "
            "or give an address with --url or NATS_URL"
        ) from None


def load(name: str) -> Source:
    """What a context says.

    Raises:
        BadInput: there is none of that name, it cannot be read, or it says what nqnb cannot follow.
    """
    if not isinstance(name, str) or not name or ".." in name or "/" in name or os.sep in name:
        raise BadInput(f"{name!r} cannot be the name of a NATS context; `nats context ls` shows yours")
    path = _folder() / "context" / f"{name}.json"
    where = f"the NATS context {name!r} ({path})"
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        raise BadInput(f"{where} does not exist; `nats context ls` shows yours, or give an address") from None
    except (OSError, ValueError) as error:
        # What the error of a parser quotes may be a password: only the place is told.
        raise BadInput(f"{where} cannot be read ({_why(error)}); repair it with `nats context edit {name}`") from None
    repair = f"change it with `nats context edit {name}`, or give the address and credentials apart"
    for key in _BEYOND_US:
        if found.get(key):
            raise BadInput(f"{where} sets {key!r}, which nqnb cannot follow; {repair}")
    values: dict[str, Any] = {}
    for key, target in _FIELDS.items():
        value = found.get(key)
        if value is None or value in ("", False):
            continue
        if not isinstance(value, bool if key == "tls_first" else str):
            raise BadInput(f"{where}: {key!r} is not a {'yes or no' if key == 'tls_first' else 'text'}; {repair}")
        if isinstance(value, str) and value.lower().startswith(_REFERENCES):
            raise BadInput(f"{where}: {key!r} refers to what only the NATS CLI can look up; {repair}")
        values[target] = _expanded(value) if key in _PATHS and isinstance(value, str) else value
    ours = {target: key for key, target in _FIELDS.items()}
    return Source(lambda target: f"{ours[target]!r} of {where}", values)


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


DEFAULT_URL = "nats://127.0.0.1:4222"
_SCHEMES = ("nats", "tls", "ws", "wss")
_SEED = re.compile(r"S[A-Z2-7]{57}")

LOGINS = (("user", "password", "token"), ("creds",), ("nkey",))
"""The ways to say who we are, in the NATS CLI's order; only one of them is used."""


def addresses_of(given: object, label: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The addresses without what they say of us, and that: the first one's word counts.

    ``label`` says in an error whose they are. Nothing of them is quoted there: in a malformed one, a password can stand
    anywhere.
    """
    if not isinstance(given, (str, Sequence)):
        raise BadInput(f"a url cannot be of type {type(given).__name__}: write it like {DEFAULT_URL}")
    urls: list[str] = []
    login: dict[str, str] = {}
    texts = given.split(",") if isinstance(given, str) else given
    if isinstance(given, str) and any(map(_may_be_one, texts, texts[1:])):
        raise BadInput(
            f"{label}: the addresses of NATS servers cannot be told apart: write a comma in a password as %2C, "
            f"and where several addresses do not all say the same of who we are, each in full, like {DEFAULT_URL}"
        )
    for number, address in enumerate(texts, 1):
        parts, problem = _split(address.strip() if isinstance(address, str) else "")
        if parts is None:
            which = label if len(texts) == 1 else f"{label}, number {number} of {len(texts)},"
            raise BadInput(f"{which} is not the address of a NATS server: write it like {DEFAULT_URL} ({problem})")
        user, password = (None if each is None else unquote(each) for each in (parts.username, parts.password))
        if user is not None and not login:
            login = {"token": user} if password is None else {"user": user, "password": password}
        shown = f"[{parts.hostname}]" if ":" in f"{parts.hostname}" else parts.hostname
        urls.append(f"{parts.scheme}://{shown}:{parts.port or 4222}{parts.path.rstrip('/')}")
    return tuple(urls), login


def _may_be_one(before: str, after: str) -> bool:
    """Whether the comma between two texts may be of a password; the same login twice is that of two addresses."""
    one, other = (text.strip().rpartition("://")[2].rpartition("@")[:2] for text in (before, after))
    return "@" in after and "://" not in after and one != other


def _split(text: str) -> tuple[SplitResult | None, str]:
    """The parts of an address; or None and what is wrong with it, in words that show nothing of it."""
    try:
        parts = urlsplit(text if "://" in text else f"nats://{text}")
    except ValueError:
        return None, "it names no host"
    rest = f"{parts.path.rstrip('/')}{parts.query}{parts.fragment}"
    # A slash in a password that is not written as %2F ends the host for urllib.
    if "@" in rest:
        return None, "in a password, / ? # are written %2F %3F %23"
    if parts.scheme not in _SCHEMES:
        return None, f"it begins with none of {', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
    if not parts.hostname:
        return None, "it names no host"
    try:
        _ = parts.port
    except ValueError:
        return None, "its port is no number up to 65535; a password ends with @ and the host"
    # With its host forgotten, a password stands where a port would, and what follows its slash where a path would.
    if rest and parts.scheme in ("nats", "tls"):
        return None, "only ws:// and wss:// have a path; in a password, / ? # are written %2F %3F %23"
    return parts, ""


def add_login(values: dict[str, Any], login: dict[str, str]) -> None:
    """What the address says of us counts where nothing beside it does."""
    named = {name for names_ in LOGINS for name in names_ if name in values}
    if named == {"password"} and "token" in login:
        values["user"] = login["token"]
    elif not named:
        values.update(login)


def login_of(sources: Sequence[Source]) -> dict[str, Any]:
    """Who we are, as the first source that says so has it."""
    for depth, source in enumerate(sources):
        kinds = [kind for kind in LOGINS if any(name in source.values for name in kind)]
        if depth == 0 and len(kinds) > 1:
            first, second = (next(name for name in kind if name in source.values) for kind in kinds[:2])
            raise BadInput(f"{first} and {second} both say who we are: give one of them")
        if kinds:
            found = {name: source.values[name] for name in kinds[0] if name in source.values}
            if kinds[0] == LOGINS[0] and "token" not in found:
                _complete(found, sources[depth + 1 :])
            return found
    return {}


def _complete(found: dict[str, Any], sources: Sequence[Source]) -> None:
    """Find the password of a user, or the user of a password, in the sources further down."""
    for source in sources:
        user, password = (source.values.get(name) for name in ("user", "password"))
        if "user" not in found and user is not None:
            found["user"] = user
        if "password" not in found and password is not None and user in (None, found.get("user")):
            found["password"] = password
    if found.get("user") and "password" not in found:
        found["token"] = found.pop("user")


def readable(label: str, path: str | os.PathLike[str]) -> str:
    """The path of a file, made sure that it can be read; ``label`` says in the error whose it is."""
    path = os.path.expanduser(path)
    try:
        with open(path, "rb"):
            return path
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{label}: the file {path!r} cannot be read ({why}); name one that can") from None


def nkey(label: str, given: str | os.PathLike[str]) -> str:
    """An nkey's seed, or the path of a file with one."""
    text = os.path.expanduser(os.fspath(given).strip())
    if _SEED.fullmatch(text):
        return text
    if os.path.isfile(text):
        return readable(label, text)
    # It may be a seed with a slip of the pen: only what is certainly a path is shown.
    shown = f" {text!r}" if os.sep in text or "." in text else ""
    raise BadInput(f"{label}{shown} is neither a seed (58 characters that begin with SU) nor a file that can be read")
