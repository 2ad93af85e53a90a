"""docs/versions.md agrees with the installed nats-server; ``NQNB_NATS_SERVER`` names another one."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.certificates import write_certificates

import nqnb
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.queue_streams import can_pause
from nqnb.jetstream.schedules import can_schedule
from nqnb.server.binary import configuration

pytestmark = pytest.mark.anyio

DOCS = Path(__file__).parents[2] / "docs"
VERSIONS = (DOCS / "versions.md").read_text(encoding="utf-8")
GO = (DOCS / "go.md").read_text(encoding="utf-8")
SCHEDULES, EXPIRY, PAUSES, TLS_FIRST = FEATURES = (
    "schedules",
    "states that expire",
    "paused consumers",
    "TLS handshake first",
)


def version_of(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def lacking(version: tuple[int, int]) -> set[str]:
    """Return what a server lacks according to docs/versions.md: its row and those of later versions."""
    rows = re.findall(r"^\| (\d+\.\d+)[^|]* \| ([^|]*) \|", VERSIONS, re.MULTILINE)
    assert [version_of(row) for row, _ in rows] == [(2, 12), (2, 11), (2, 10), (2, 9)]
    return {
        each for row, lacks in rows for each in lacks.split(", ") if each != "nothing" and version_of(row) >= version
    }


async def found(connection: Connection, server: nqnb.DevServer, folder: Path) -> set[str]:
    """Return what the server really has, without nqnb's checks of versions."""
    features = set()
    stream = {"name": "probe", "subjects": ["probe.>"], "allow_msg_schedules": True, "allow_msg_ttl": True}
    config = (await connection.api("STREAM.CREATE.probe", stream))["config"]
    features |= {SCHEDULES} if config.get("allow_msg_schedules") else set()
    features |= {EXPIRY} if config.get("allow_msg_ttl") else set()
    consumer = {"durable_name": "c", "ack_policy": "explicit", "pause_until": "2200-01-01T00:00:00Z"}
    body = {"stream_name": "probe", "config": consumer}
    info = await connection.api("CONSUMER.DURABLE.CREATE.probe.c", body)
    features |= {PAUSES} if info.get("paused") else set()
    write_certificates(folder)
    tls = f'tls {{ cert_file: "{folder / "server.pem"}", key_file: "{folder / "server.key"}", handshake_first: true }}'
    try:
        with nqnb.DevServer(config=tls):
            features.add(TLS_FIRST)
    except nqnb.DevServerError as error:
        if 'unknown field ["handshake_first"]' not in str(error):
            raise
    return features


async def test_the_docs_say_what_this_server_version_lacks(
    nq: nqnb.Client, server: nqnb.DevServer, tmp_path: Path
) -> None:
    version = version_of(server.version)
    lacks = lacking(version)
    assert lacks == set(FEATURES) - await found(nq.backend.connection, server, tmp_path)
    assert can_schedule(nq.backend.connection) == (SCHEDULES not in lacks)
    assert can_pause(nq.backend.connection) == (PAUSES not in lacks)
    assert (nq.backend.terminal_ttl is not None) == (EXPIRY not in lacks)


@pytest.mark.parametrize("wait", [timedelta(hours=2), timedelta(seconds=45)])
async def test_a_task_that_waits_is_counted_as_scheduled(
    nq: nqnb.Client, settings: nqnb.Settings, wait: timedelta
) -> None:
    worker = nqnb.Worker(settings)

    @worker.handler("later")
    async def later(job: nqnb.Job) -> None:
        pass

    async with worker:
        task = await nq.submit("later", process_at=wait)

        async def settled() -> tuple[int, int, int]:
            while True:
                (info,) = await nq.queues()
                if not info.pending:
                    return info.pending, info.scheduled, info.processing
                await asyncio.sleep(0.02)

        assert await asyncio.wait_for(settled(), 30) == (0, 1, 0)
        assert (await task.cancel()).status is nqnb.Status.DELETED


def test_the_mappings_are_those_that_are_written(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```conf\n(mappings \{.*?\n\})\n```", GO, re.DOTALL)
    assert lines in configuration(tmp_path, 0, None, ["resize"], "")
