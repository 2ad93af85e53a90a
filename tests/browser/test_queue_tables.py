"""The live tables of queues and workers: what they say of trouble, and their buttons."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from browser import axe
from browser.bucket import Bucket
from browser.sheets import Sheet

import nqnb

WORKER = """
import asyncio, nqnb, sys
worker = nqnb.Worker(sys.argv[1], ack_wait=3)

@worker.handler("served")
async def served(job, payload):
    await asyncio.sleep(600)

worker.run()
"""
SETUP = """
import nqnb
nq = nqnb.session()
waiting = nq.submit_many("idle", range(4))
held = nq.submit("served", "<b>held</b>")
nq.watch_queues()
"""


def start(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, url], stderr=subprocess.DEVNULL)


@pytest.mark.full
def test_queues_and_workers_say_what_is_wrong(
    sheet: Callable[..., Sheet], look: Bucket, server: nqnb.DevServer, shot: Callable[[Any, str], Any]
) -> None:
    first = start(server.url)
    others: list[subprocess.Popen[bytes]] = []
    try:
        page = sheet(
            "lab", SETUP, "nq.watch_workers()", "import time; time.sleep(60)", "%load_ext nqnb\n%nq watch --queues"
        )
        page.run(0)
        page.run(1)
        queues = page.output(1).locator(".nq-board")
        page.run(2)
        workers = page.output(2).locator(".nq-board")

        def row(board: Any, key: str) -> str:
            return str(board.locator("tbody tr", has_text=key).first.inner_text())

        def paused() -> dict[str, bool]:
            return {info.name: info.paused for info in look.call(look.client.queues)}

        page.until(lambda: "no worker is listening" in row(queues, "idle"), "the queue without workers says so")
        page.until(lambda: "live" in row(workers, f"/{first.pid}"), "the worker is live")
        page.until(lambda: "1/" in row(workers, f"/{first.pid}"), "the worker runs the task")
        shot(queues, "queues")

        # The buttons work while a cell is busy, and ask first.
        page.start(3)
        idle = queues.locator("tbody tr", has_text="idle")
        idle.get_by_role("button", name="Pause idle").click()
        idle.locator("[data-no]").click()
        assert "paused" not in idle.inner_text()
        idle.get_by_role("button", name="Pause idle").click()
        assert "Its tasks will not start" in idle.inner_text()
        shot(queues, "queue-question")
        idle.locator("[data-yes]").click()
        page.until(lambda: "paused: workers start no tasks" in row(queues, "idle"), "the queue is paused")
        assert paused() == {"idle": True, "served": False}
        idle.get_by_role("button", name="Resume idle").click()
        idle.locator("[data-yes]").click()
        page.until(lambda: "paused" not in row(queues, "idle"), "the queue is resumed")
        assert paused() == {"idle": False, "served": False}
        idle.get_by_role("button", name="Purge idle").click()
        assert "End the 4 waiting tasks of idle?" in idle.inner_text()
        idle.locator("[data-yes]").click()
        page.until(lambda: "idle was purged: 4 deleted" in queues.inner_text(), "the queue is purged")
        assert look.counts("idle") == {"deleted": 4}
        page.interrupt()
        page.ended(3)

        # A killed worker is lost, and its task runs on another one.
        others.append(start(server.url))
        page.until(lambda: f"/{others[0].pid}" in workers.inner_text(), "the other worker is there")
        first.kill()
        page.until(lambda: "lost for" in row(workers, f"/{first.pid}"), "the killed worker is lost")
        page.until(lambda: "now running on" in row(workers, f"/{first.pid}"), "its task runs elsewhere")
        assert look.counts("served") == {"processing": 1}
        page.until(lambda: "1/" in row(workers, f"/{others[0].pid}"), "the other worker shows it")
        page.until(lambda: "is lost" in row(queues, "served"), "the queue names the lost worker")
        shot(workers, "workers")
        assert axe.findings(page.page, ".nq-board") == []
        served = queues.locator("tbody tr", has_text="served")
        served.get_by_role("button", name="Cancel all served").click()
        served.locator("[data-yes]").click()
        page.until(lambda: "tasks of served: 1 cancelled" in queues.inner_text(), "the tasks are cancelled")
        page.until(lambda: look.counts("served") == {"cancelled": 1}, "its code has stopped")

        page.run(4)
        page.until(lambda: "idle" in page.output(4).locator(".nq-board").inner_text(), "the table of the magic")
    finally:
        for each in (first, *others):
            each.kill()
            each.wait()
