"""Reads where the server is and who we are out of addresses, arguments, the environment and NATS CLI contexts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import unquote, urlsplit

from nqnb.contexts import Source
from nqnb.errors import BadInput

DEFAULT_URL = "nats://127.0.0.1:4222"
_SCHEMES = ("nats", "tls", "ws", "wss")
_SEED = re.compile(r"S[A-Z2-7]{57}")

LOGINS = (("user", "password", "token"), ("creds",), ("nkey",))
"""The ways to say who we are, in the NATS CLI's order; only one of them is used."""


def addresses_of(given: object) -> tuple[tuple[str, ...], dict[str, str]]:
    """The addresses without what they say of us, and that: the first one's word counts."""
    if not isinstance(given, (str, Sequence)):
        raise BadInput(f"a url cannot be of type {type(given).__name__}: write it like {DEFAULT_URL}")
    urls: list[str] = []
    login: dict[str, str] = {}
    texts = given.split(",") if isinstance(given, str) else given
    if isinstance(given, str) and any("@" in b and "://" not in b and "@" not in a for a, b in pairwise(texts)):
        # What stands before the comma may be the beginning of a password, so none of it is shown.
        raise BadInput(
            "the addresses of NATS servers cannot be told apart: write a comma in a password as %2C, "
            f"and where only some of several addresses say who we are, each in full, like {DEFAULT_URL}"
        )
    for address in texts:
        text = address.strip() if isinstance(address, str) else ""
        where = text.rpartition("@")[2]
        try:
            parts = urlsplit(text if "://" in text else f"nats://{text}")
            port, host = parts.port, parts.hostname
        except ValueError:
            host = None
        # A slash in a password that is not written as %2F ends the host for urllib.
        if not host or parts.scheme not in _SCHEMES or "@" in f"{parts.path}{parts.query}{parts.fragment}":
            if "@" not in text:
                # With its host forgotten, a password stands where a port would.
                where = re.sub(r"^((?:\w+://)?[^:]*:).+", r"\1…", where)
            raise BadInput(f"{where!r} is not the address of a NATS server: write it like {DEFAULT_URL}")
        user, password = (None if each is None else unquote(each) for each in (parts.username, parts.password))
        if user is not None and not login:
            login = {"token": user} if password is None else {"user": user, "password": password}
        shown = f"[{host}]" if ":" in host else host
        urls.append(f"{parts.scheme}://{shown}:{port or 4222}{parts.path.rstrip('/')}")
    return tuple(urls), login


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
