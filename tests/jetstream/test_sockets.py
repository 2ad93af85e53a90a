"""A closed connection leaves no socket open, even if nats-py had little time to close it."""

from __future__ import annotations

from typing import Any

import pytest

import nqnb
from nqnb.jetstream import connect

pytestmark = pytest.mark.anyio


def transport(client: nqnb.Client) -> Any:
    """Return the transport that has the socket of an open client."""
    carrier: Any = client.backend.connection.client._transport
    return carrier._io_writer.transport


async def test_a_close_without_time_closes_the_socket(settings: nqnb.Settings) -> None:
    client = nqnb.connect(settings)
    await client.open()
    carrier = transport(client)
    await connect.leave(client.backend.connection.client, 0.0)
    assert carrier.is_closing()
    await client.close()


async def test_a_close_that_nats_py_has_begun_closes_the_socket(settings: nqnb.Settings) -> None:
    client = nqnb.connect(settings)
    await client.open()
    carrier = transport(client)
    client.backend.connection.client._status = client.backend.connection.client.CLOSED
    await client.close()
    assert carrier.is_closing()
