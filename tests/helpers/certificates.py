"""Certificates and NATS identities, created by each run of the tests."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]  # it has no types
import trustme


def write_certificates(folder: Path) -> None:
    """Write two authorities and the certificates that they have signed.

    ``ca.pem`` and ``stranger.pem``; ``server``, ``named`` (a server whose certificate has only a host name),
    ``elsewhere`` (a server on another host), ``client`` and ``intruder`` (a client of the stranger), each as ``.pem``
    and ``.key``.
    """
    ca, stranger = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    stranger.cert_pem.write_to_path(folder / "stranger.pem")
    for name, authority, identity in (
        ("server", ca, "127.0.0.1"),
        ("named", ca, "localhost"),
        ("elsewhere", ca, "elsewhere.example"),
        ("client", ca, "ann@example.com"),
        ("intruder", stranger, "ann@example.com"),
    ):
        leaf = authority.issue_cert(identity)
        leaf.private_key_pem.write_to_path(folder / f"{name}.key")
        leaf.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")


def new_key(role: str) -> tuple[str, str]:
    """Return the seed and the public key of a new ``operator``, ``account`` or ``user``."""
    prefix = {
        "operator": nkeys.PREFIX_BYTE_OPERATOR,
        "account": nkeys.PREFIX_BYTE_ACCOUNT,
        "user": nkeys.PREFIX_BYTE_USER,
    }[role]
    seed = nkeys.encode_seed(os.urandom(32), prefix).decode()
    return seed, nkeys.from_seed(bytearray(seed.encode())).public_key.decode()


class Operator:
    """An operator with one account that has JetStream, and a system account."""

    def __init__(self) -> None:
        self._seed, self.key = new_key("operator")
        self._account_seed, self.account = new_key("account")
        _, system = new_key("account")
        limits = {"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1, "payload": -1}
        limits |= {"wildcards": True, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        accounts = {
            self.account: _jwt(self._seed, self.account, "account", limits=limits),
            system: _jwt(self._seed, system, "account", limits={**limits, "mem_storage": 0, "disk_storage": 0}),
        }
        preload = "\n".join(f"  {key}: {jwt}" for key, jwt in accounts.items())
        self.config = (
            f"operator: {_jwt(self._seed, self.key, 'operator', system_account=system)}\n"
            f"system_account: {system}\nresolver: MEMORY\nresolver_preload {{\n{preload}\n}}\n"
        )
        """The configuration of a server of this operator."""

    def credentials(
        self, expires: float | None = None, account_seed: str | None = None, deny: Sequence[str] = ()
    ) -> tuple[str, str]:
        """Return the content of a credentials file of a new user, and the seed in it.

        Args:
            expires: in seconds from now.
            account_seed: whose user it is; default this operator's account.
            deny: what the user may not publish to.
        """
        seed, key = new_key("user")
        claims: dict[str, Any] = {} if expires is None else {"exp": int(time.time() + expires)}
        jwt = _jwt(
            account_seed or self._account_seed,
            key,
            "user",
            claims,
            subs=-1,
            data=-1,
            payload=-1,
            pub={"deny": list(deny)},
        )
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        ), seed


def _jwt(issuer_seed: str, subject: str, kind: str, claims: dict[str, Any] | None = None, **body: Any) -> str:
    issuer = nkeys.from_seed(bytearray(issuer_seed.encode()))
    header = {"typ": "JWT", "alg": "ed25519-nkey"}
    content = {
        "jti": base64.b32encode(os.urandom(32)).decode().rstrip("="),
        "iat": int(time.time()) - 60,
        "iss": issuer.public_key.decode(),
        "name": kind,
        "sub": subject,
        "nats": {**body, "type": kind, "version": 2},
        **(claims or {}),
    }
    signed = ".".join(_base64(json.dumps(part).encode()) for part in (header, content))
    return f"{signed}.{_base64(issuer.sign(signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
