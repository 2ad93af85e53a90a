"""The health checks of a worker: when it is alive, when it is ready, and why it is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.scrape import free_port
from helpers.waiting import until_async

import nqnb
from nqnb import http_endpoint
from nqnb.commands.worker_commands import worker as worker_command
from nqnb.listen_address import THIS_MACHINE, ListenAddress
from nqnb.worker.loop_guard import MOST_MISSED_TICKS
from nqnb.worker.runtime import MAX_BLOCK_SECONDS, MAX_OUTAGE_SECONDS

pytestmark = pytest.mark.anyio

OK = (200, "ok")


def ask(port: int, path: str) -> tuple[int, str]:
    """Return the status and the text of a check."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode().strip()


def test_on_windows_a_port_in_use_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, SO_REUSEADDR would allow two workers to listen on the same port."""
    monkeypatch.setattr(http_endpoint, "os", SimpleNamespace(name="nt"))
    with http_endpoint._server(ListenAddress(THIS_MACHINE, 0)) as server:
        assert not server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


async def health(port: int) -> tuple[int, str]:
    return await asyncio.to_thread(ask, port, "/healthz")


async def readiness(port: int) -> tuple[int, str]:
    return await asyncio.to_thread(ask, port, "/readyz")


def new_worker(settings: nqnb.Settings | str, port: int, **options: Any) -> nqnb.Worker:
    worker = nqnb.Worker(settings, health=port, **options)

    @worker.handler("block")
    async def block(job: nqnb.Job, payload: float) -> None:
        time.sleep(payload)  # noqa: ASYNC251  blocking is what it is for

    return worker


async def test_a_worker_is_alive_from_its_start_and_ready_until_it_stops(
    settings: nqnb.Settings, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # health checks need no extra
    port = free_port()
    worker, go = new_worker(settings, port), asyncio.Event()

    @worker.handler("wait")
    async def wait(job: nqnb.Job) -> None:
        await go.wait()

    await worker.start()
    assert (await health(port), await readiness(port)) == (OK, OK)
    assert await asyncio.to_thread(ask, port, "/") == (404, "not found: use /healthz or /readyz")
    await nq.submit("wait")
    await until_async(lambda: worker.running)
    worker.pause()
    assert await readiness(port) == (503, "the worker is paused, and pulls no more tasks")
    stopping = asyncio.ensure_future(worker.stop())

    async def says_so() -> bool:
        return await readiness(port) == (503, "the worker is stopping")

    await until_async(says_so)
    assert await health(port) == OK, "a worker that waits for its tasks must not be killed"
    go.set()
    await stopping
    with pytest.raises(OSError, match="refused"):
        await health(port)
    async with worker:
        assert (await health(port), await readiness(port)) == (OK, OK)


async def test_a_worker_that_cannot_hear_cancels_yet_is_not_ready() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        worker = new_worker(f"nats://127.0.0.1:{silent.getsockname()[1]}", port, connect_timeout=3.0)
        starting = asyncio.ensure_future(worker.start())

        async def answers() -> bool:
            with contextlib.suppress(OSError):
                return await health(port) == OK
            return False

        await until_async(answers)
        assert await readiness(port) == (503, "the worker is starting")
        with pytest.raises(nqnb.NoServer):
            await starting
    with pytest.raises(OSError, match="refused"):
        await health(port)


async def test_a_worker_whose_connection_is_closed_for_good_is_neither_alive_nor_ready(
    settings: nqnb.Settings, nq: nqnb.Client
) -> None:
    port = free_port()
    worker = new_worker(settings, port)
    await worker.start()
    assert worker._runtime is not None
    await worker._runtime.backend.close()
    failed = (503, "the worker has failed, or its connection is closed")
    assert (await health(port), await readiness(port)) == (failed, failed)
    await worker.stop()


@pytest.mark.full
async def test_a_worker_that_lost_its_server_is_not_ready_and_later_not_alive(
    settings: nqnb.Settings, server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nqnb.worker.runtime.MAX_OUTAGE_SECONDS", 0.5)
    port = free_port()
    async with new_worker(settings, port):
        await asyncio.to_thread(server.kill)

        async def is_lost() -> bool:
            status, reason = await readiness(port)
            return status == 503 and reason.startswith("the connection to the server is lost")

        async def gives_up() -> bool:
            return (await health(port))[0] == 503

        async def is_ready() -> bool:
            return await readiness(port) == OK

        await until_async(is_lost)
        await until_async(gives_up)
        assert (await health(port))[1].startswith("the connection has been lost for ")
        await asyncio.to_thread(server.restart)
        await until_async(is_ready)
        assert await health(port) == OK


async def test_with_a_long_ack_wait_an_outage_must_last_longer_and_blocks_are_still_found(
    settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leases of an ack wait of ten minutes are still valid after an outage of five minutes."""
    async with new_worker(replace(settings, ack_wait=600.0), free_port()) as worker:
        runtime = worker._runtime
        assert runtime is not None
        monkeypatch.setattr("nqnb.jetstream.backend.Backend.lost_for", lambda backend: 400.0)
        assert runtime.failure() == ""
        monkeypatch.setattr("nqnb.jetstream.backend.Backend.lost_for", lambda backend: 700.0)
        assert runtime.failure() == "the connection has been lost for 700 s"
        assert runtime._pulse.interval * MOST_MISSED_TICKS < MAX_BLOCK_SECONDS / 2


@pytest.mark.full
async def test_a_worker_whose_event_loop_is_blocked_is_not_ready_and_later_not_alive(
    settings: nqnb.Settings, nq: nqnb.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nqnb.worker.runtime.MAX_BLOCK_SECONDS", 1.5)
    port = free_port()
    answers: list[tuple[tuple[int, str], tuple[int, str]]] = []
    over = threading.Event()

    def probe() -> None:
        while not over.wait(0.05):
            answers.append((ask(port, "/healthz"), ask(port, "/readyz")))

    async with new_worker(settings, port):
        probing = threading.Thread(target=probe)
        probing.start()
        try:
            await (await nq.submit("block", 3.0)).wait(30)
            await until_async(lambda: [code for code, _ in answers[-1]] == [200, 200])
        finally:
            over.set()
            probing.join()
    seen = [(alive[0], ready[0]) for alive, ready in answers]
    assert {(200, 200), (200, 503), (503, 503)} <= set(seen)
    blocked = next(texts for texts, codes in zip(answers, seen, strict=True) if codes == (503, 503))
    assert all(text.startswith("the event loop has been blocked for ") for _, text in blocked)


async def test_a_port_that_is_taken_stops_the_start(settings: nqnb.Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        expected = rf"health checks cannot be served on 127.0.0.1:{port}: .*in use"
        with pytest.raises(nqnb.HealthUnavailable, match=expected):
            await new_worker(settings, port).start()


def test_the_help_and_the_docs_state_the_limits() -> None:
    block, outage = f"{MAX_BLOCK_SECONDS:.0f} seconds", f"{MAX_OUTAGE_SECONDS / 60:.0f} minutes"
    page = (Path(__file__).parents[2] / "docs" / "production.md").read_text()
    assert f"for more than {block}, or the connection is lost for more than {outage}" in page
    said = " ".join((worker_command.help or "").split())
    assert f"for more than {block}. It also fails if the connection has been lost for more than {outage}" in said


def test_a_port_without_a_host_means_this_machine() -> None:
    assert nqnb.Worker(health=8080).health == (THIS_MACHINE, 8080)
    assert f"{nqnb.Worker(health='[::]:8080').health}" == "[::]:8080"
    with pytest.raises(nqnb.BadInput, match="health address 'x' is invalid"):
        ListenAddress.of("x", "health")
