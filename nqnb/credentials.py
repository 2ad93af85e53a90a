"""Reads where the server is and who we are out of addresses, arguments, the environment and NATS CLI contexts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from nqnb.contexts import Source
from nqnb.errors import BadInput

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
