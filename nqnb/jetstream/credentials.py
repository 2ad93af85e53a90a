"""Credentials files and nkey seeds: read, and checked before a server sees what they sign."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from pathlib import Path
from typing import Any

from nqnb.errors import BadInput

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
