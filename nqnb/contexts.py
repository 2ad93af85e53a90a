"""The contexts of the NATS CLI: named files that say where a server is and who we are there.

They lie in ``$XDG_CONFIG_HOME/nats`` (else ``~/.config/nats``, on every system): ``context/NAME.json``, and the name
of the selected one in ``context.txt``. This is jsm.go's package ``natscontext``, as far as a library needs it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nqnb.errors import BadInput

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
        values[target] = _path(value) if key in _PATHS and isinstance(value, str) else value
    ours = {target: key for key, target in _FIELDS.items()}
    return Source(lambda target: f"{ours[target]!r} of {where}", values)


def _folder() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home, "nats")


def _path(value: str) -> str:
    return os.path.expanduser(os.path.expandvars(value.removeprefix("file://")))


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, column {error.colno}: {error.msg}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
