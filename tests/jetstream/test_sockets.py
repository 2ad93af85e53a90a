"""A closed or dead connection leaves no socket open, even if nats-py had little time to close it."""

from __future__ import annotations

from typing import Any

import nats.errors
import pytest
from helpers.waiting import until_async

import nqnb
from nqnb.jetstream import connect
from nqnb.testing.proxy import Proxy

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


async def test_a_dead_link_with_unsent_data_does_not_delay_the_reconnect(server: nqnb.DevServer) -> None:
    async with Proxy(server) as proxy, nqnb.connect(proxy.url) as nq:
        connection = nq.backend.connection
        proxy.swallow()
        # The sockets of this machine may hold many megabytes.
        while transport(nq).get_write_buffer_size() == 0:
            transport(nq).write(b"PUB unread 65536\r\n" + bytes(65536) + b"\r\n")
        # After two PINGs without an answer, nats-py does this.
        await connection.client._process_op_err(nats.errors.StaleConnectionError())
        await until_async(lambda: connection.losses == 1, what="the client knows that the connection is lost")
        proxy.hang_up()
        await proxy.heal()
        await until_async(lambda: connection.connected, what="the client is connected again")
        assert (await nq.submit("resize")).id
