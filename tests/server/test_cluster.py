"""The cluster of the failover tests: it elects leaders, survives one death, and says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

import nqnb
from nqnb.errors import BadInput, DevServerError
from nqnb.server.cluster import Cluster

pytestmark = pytest.mark.anyio


@pytest.mark.full
async def test_a_cluster_survives_the_death_of_a_streams_leader() -> None:
    async with Cluster() as cluster:
        settings = nqnb.Settings(cluster.urls, replicas=3)
        async with nqnb.connect(settings) as nq:
            task = await nq.submit("work", 1)
            assert cluster.running == [0, 1, 2]
            killed = cluster.kill_leader("KV_nq-store")
            assert killed not in cluster.running
            assert cluster.wait_for_leader("KV_nq-store") != killed
            assert (await task.fetch()).status is nqnb.Status.PENDING
            cluster.restart(killed)
            cluster.wait_ready()
            assert cluster.running == [0, 1, 2]
            # A command has no option for the number of replicas, but its streams survive the loss of a server too.
            async with nqnb.connect(nqnb.Settings(cluster.urls)) as other:
                await other.pause("work")
                await other.submit("other", 1)
                assert other.settings.replicas == 1
                for stream in (f"KV_{settings.queue_bucket}", "other", "other_cancel"):
                    info = await other.backend.connection.api(f"STREAM.INFO.{stream}")
                    assert info["config"]["num_replicas"] == 3
        pids = [server.pid for server in cluster.servers]
    assert not cluster.servers
    assert len(set(pids)) == 3


def test_a_cluster_that_is_not_started_says_so() -> None:
    cluster = Cluster()
    with pytest.raises(DevServerError, match="not been started"):
        cluster.kill(0)


@pytest.mark.parametrize("size", [1, 10, "3", None, 2.5, True])
def test_the_size_of_a_cluster_is_checked(size: Any) -> None:
    with pytest.raises(BadInput, match=f"size={size!r} is invalid: .* the number of servers, from 2 to 9"):
        Cluster(size)


def test_the_configuration_of_a_cluster_is_checked() -> None:
    with pytest.raises(BadInput, match="config is invalid: expected a string"):
        Cluster(config=None)  # type: ignore[arg-type]  # that is what is tested
