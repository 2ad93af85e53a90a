"""The metrics of a worker: runs, waits, cancels and redeliveries, and the errors of an endpoint that cannot start."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time

import pytest
from helpers.scrape import free_port, scrape
from helpers.waiting import until_async

import nqnb
from nqnb.listen_address import ListenAddress
from nqnb.metrics.histogram import BOUNDS_SECONDS, Histogram, QueueLabels

pytestmark = pytest.mark.anyio


async def test_a_scrape_shows_what_the_worker_has_run_and_is_running(settings: nqnb.Settings, nq: nqnb.Client) -> None:
    port = free_port()
    worker = nqnb.Worker(settings, concurrency=4, metrics=f"127.0.0.1:{port}")
    started = asyncio.Event()

    @worker.handler("resize", backoff=nqnb.Backoff(0.05, 0.05))
    async def resize(job: nqnb.Job, payload: object) -> None:
        if payload == "slow":
            started.set()
        await asyncio.sleep(60 if payload == "slow" else 0.03)
        if payload == "bad" or (payload == "flaky" and job.attempt == 1):
            raise ValueError

    async with worker:
        ended = [await nq.submit("resize", what, retry=retry) for what, retry in (("a", 0), ("bad", 0), ("flaky", 1))]
        for task in ended:
            await task.wait(30)
        slow = await nq.submit("resize", "slow")
        await started.wait()  # a task is registered before it is claimed, and could then still be deleted
        await until_async(lambda: worker.running == [slow.id])
        before = await scrape(port)
        await slow.cancel(wait=30)
        await until_async(lambda: not worker.running)

        async def is_counted() -> bool:
            return (await scrape(port)).of("nqnb_worker_runs_total", queue="resize", outcome="cancelled") == 1

        await until_async(is_counted)
        after = await scrape(port)
    outcomes = {
        each: before.of("nqnb_worker_runs_total", queue="resize", outcome=each)
        for each in ("completed", "failed", "retried", "cancelled", "dropped")
    }
    assert outcomes == {"completed": 2, "failed": 1, "retried": 1, "cancelled": 0, "dropped": 0}
    assert before.of("nqnb_worker_running_tasks", queue="resize") == 1
    assert before.of("nqnb_worker_concurrency") == 4
    assert before.of("nqnb_worker_connected") == 1
    assert before.of("nqnb_worker_info", worker=worker.id, version=nqnb.__version__) == 1
    assert before.of("nqnb_worker_run_seconds_count", queue="resize") == 4
    assert before.of("nqnb_worker_run_seconds_bucket", queue="resize", le="0.025") == 0
    assert before.of("nqnb_worker_wait_seconds_count", queue="resize") == 3, "a wait is counted once a task"
    assert before.of("nqnb_worker_redeliveries_total", queue="resize") == 1
    assert before.of("process_cpu_seconds_total") is not None
    assert after.of("nqnb_worker_runs_total", queue="resize", outcome="cancelled") == 1
    assert after.of("nqnb_worker_cancel_seconds_count", queue="resize") == 1
    with pytest.raises(OSError, match="refused"):
        await scrape(port)


async def test_a_cancel_whose_code_does_not_stop_is_shown_with_its_age(
    settings: nqnb.Settings, nq: nqnb.Client
) -> None:
    port = free_port()
    worker = nqnb.Worker(settings, metrics=f"127.0.0.1:{port}")
    worker.handler("other")(lambda payload: None)
    started, release = threading.Event(), threading.Event()

    @worker.handler("stuck")
    def stuck(job: nqnb.Job) -> None:
        started.set()
        release.wait(30)  # no exception is raised within threading

    async def age(queue: str) -> float:
        return (await scrape(port)).of("nqnb_worker_oldest_cancel_seconds", queue=queue) or 0.0

    async def is_shown() -> bool:
        return await age("stuck") > 0.2

    async with worker:
        task = await nq.submit("stuck")
        await until_async(started.is_set, 10)
        assert await age("stuck") == 0
        requested = time.monotonic()
        assert (await task.cancel()).stopping
        await until_async(is_shown, 10)
        assert await age("stuck") < time.monotonic() - requested + 0.5
        assert await age("other") == 0
        release.set()
        await task.wait(10)
        await until_async(lambda: not worker.running, 10)
        assert await age("stuck") == 0


async def test_a_port_that_is_taken_stops_the_start_and_a_later_start_works(
    settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        worker = nqnb.Worker(settings, metrics=f"127.0.0.1:{port}")
        worker.handler("q")(lambda payload: None)
        with pytest.raises(nqnb.MetricsUnavailable, match=rf"metrics cannot be served on 127.0.0.1:{port}: .*in use"):
            await worker.start()
    async with worker:
        assert (await scrape(port)).of("nqnb_worker_connected") == 1
    assert f"serving metrics on http://127.0.0.1:{port}/metrics" in caplog.text


async def test_a_worker_that_cannot_connect_stops_serving_metrics() -> None:
    port = free_port()
    worker = nqnb.Worker("nats://127.0.0.1:1", metrics=port)
    worker.handler("q")(lambda payload: None)
    with pytest.raises(nqnb.NoServer):
        await worker.start()
    with pytest.raises(OSError, match="refused"):
        await scrape(port)


async def test_a_missing_extra_is_named(settings: nqnb.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    worker = nqnb.Worker(settings, metrics=0)
    worker.handler("q")(lambda payload: None)
    with pytest.raises(nqnb.MetricsUnavailable, match=r"prometheus-client cannot be imported.*'nqnb\[metrics\]'"):
        await worker.start()


@pytest.mark.parametrize("value", [-1, 65536, True, 1.5, "", "x", "host:", "1.5", "host:99999", "٣", b"9464", "a:b:x"])
def test_an_invalid_address_is_refused(value: object) -> None:
    with pytest.raises(nqnb.BadInput, match="metrics address"):
        ListenAddress.of(value)


def test_addresses() -> None:
    everywhere = "0.0.0.0"  # noqa: S104  nothing is bound
    assert ListenAddress.of(9464) == ListenAddress.of("9464") == (everywhere, 9464)
    assert ListenAddress.of("127.0.0.1:0") == ("127.0.0.1", 0)
    assert f"{ListenAddress.of('[::1]:9464')}" == "[::1]:9464"


def test_queues_beyond_the_limit_share_a_label() -> None:
    labels = QueueLabels(2)
    assert [labels.of(queue) for queue in ("b", "a", "c", "b")] == ["b", "a", "other", "b"]
    assert labels.used == ["a", "b", "other"]


def test_a_histogram_counts_each_duration_once() -> None:
    histogram = Histogram()
    for seconds in (-1.0, 0.005, 0.3, 1e9):
        histogram.observe(seconds)
    buckets = dict(histogram.buckets)
    assert (buckets["0.005"], buckets["0.25"], buckets["0.5"], buckets["+Inf"]) == (2, 2, 3, 4)
    assert len(buckets) == len(BOUNDS_SECONDS) + 1
    assert histogram.seconds == pytest.approx(1e9 + 0.305)
