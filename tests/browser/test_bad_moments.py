"""A live table tells the truth in bad moments: a restarted kernel, a lost server, and a killed worker."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser.bucket import Bucket
from browser.sheets import Sheet
from helpers.worker_processes import WorkerProcesses

import nqnb
from nqnb import Status

SETUP = """
import nqnb
nq = nqnb.session()

@nq.handler("slow", concurrency=4)
async def slow(job, payload):
    import asyncio
    await asyncio.sleep(600)
"""


def state(page: Sheet, i: int) -> str:
    """Return what the heading of a table says about its connection."""
    return page.output(i).locator(".nq-state").inner_text()


@pytest.mark.full
def test_after_a_kernel_restart_the_buttons_of_an_old_table_are_off(
    sheet: Callable[..., Sheet], look: Bucket, shot: Callable[[Any, str], Path]
) -> None:
    page = sheet("lab", SETUP, 'nq.watch("slow")', "import nqnb; nqnb.session().watch('slow')")
    page.run(0)
    page.run(1)
    task = look.submit("slow")
    page.run(2)
    table = page.table(2)
    table.until(lambda: table.ids == [task] and table.label(task) == "processing", "it runs")
    page.restart()
    page.until(lambda: state(page, 2) == "kernel restarted: run the cell again", "the table says so")
    assert table.button(task).get_attribute("aria-disabled") == "true"
    table.button(task).click(force=True)
    ran = table.row(task).locator("td.nq-run").inner_text()
    page.page.wait_for_timeout(1500)
    assert table.row(task).locator("td.nq-run").inner_text() == ran
    assert not look.status(task).terminal
    shot(page.output(2), "restarted")
    page.run(0)
    page.run(1)
    page.run(3)
    again = page.table(3)
    again.until(lambda: again.ids == [task], "a new table of the new kernel")
    assert state(page, 2) == "kernel restarted: run the cell again"
    again.button(task).click()
    assert look.ended(task, 60)[0] is Status.CANCELLED


@pytest.mark.full
def test_after_a_kernel_crash_the_table_says_that_the_kernel_restarted(
    sheet: Callable[..., Sheet], look: Bucket
) -> None:
    page = sheet("lab", SETUP, 'nq.watch("slow")', "import os; print(os.getpid())")
    page.run(0)
    page.run(1)
    task = look.submit("slow")
    page.run(2)
    table = page.table(2)
    table.until(lambda: table.ids == [task], "its row")
    os.kill(int(page.run(3)), signal.SIGKILL)
    page.until(lambda: state(page, 2) == "kernel restarted: run the cell again", "the table says so")
    assert table.button(task).get_attribute("aria-disabled") == "true"


@pytest.mark.full
def test_while_the_server_is_gone_a_press_is_not_sent_yet(
    sheet: Callable[..., Sheet], look: Bucket, server: nqnb.DevServer, shot: Callable[[Any, str], Path]
) -> None:
    page = sheet("lab", SETUP, 'nq.watch("slow")')
    page.run(0)
    page.run(1)
    task = look.submit("slow")
    page.run(2)
    table = page.table(2)
    table.until(lambda: table.ids == [task] and table.label(task) == "processing", "it runs")
    server.kill()
    page.until(lambda: state(page, 2).startswith("connection lost"), "the table says so")
    ran = table.row(task).locator("td.nq-run").inner_text()
    table.button(task).click()
    table.until(lambda: table.button(task).inner_text() == "not sent yet", "the press is not sent")
    page.page.wait_for_timeout(1500)
    assert table.row(task).locator("td.nq-run").inner_text() == ran
    shot(page.output(2), "lost")
    server.restart()
    table.until(lambda: table.label(task) == "cancelled", "the press is sent now")
    assert look.ended(task, 60)[0] is Status.CANCELLED


@pytest.mark.full
def test_the_row_of_a_killed_worker_says_that_it_is_silent(
    sheet: Callable[..., Sheet],
    look: Bucket,
    server: nqnb.DevServer,
    tmp_path: Path,
    shot: Callable[[Any, str], Path],
) -> None:
    settings = dataclasses.replace(look.client.settings, ack_wait=20.0)
    with WorkerProcesses(settings, tmp_path / "diary") as workers:
        process = workers.start()
        page = sheet("lab", "import nqnb\nnqnb.session().watch('thread')")
        page.run(0)
        task = look.submit("thread", 600)
        page.run(1)
        table = page.table(1)
        table.until(lambda: table.ids == [task] and table.label(task) == "processing", "it runs")
        process.kill()
        said = page.until(partial(silence, table, task), "the row says so")
        assert int(said.split()[-2]) >= 11, "after a missed heartbeat"
        page.until(lambda: silence(table, task) not in ("", said), "the time goes on")
        assert look.status(task) is Status.PROCESSING
        shot(page.output(1), "silent")
        workers.start()
        table.until(lambda: table.label(task) == "processing", "another worker has taken it over", 60)


def silence(table: Any, task: str) -> str:
    """Return how long the worker of a task has been silent according to its row, or an empty string."""
    label = str(table.label(task))
    return label if label.startswith("worker silent for ") else ""
