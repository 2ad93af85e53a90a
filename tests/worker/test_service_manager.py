"""What a worker reports to systemd, and the unit of the repository."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nqnb

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd's socket is a Unix socket")
UNIT = Path(__file__).parents[2] / "deploy" / "nqnb-worker@.service"
JOBS = """
import os
import nqnb

worker = nqnb.Worker()


def seen(job):
    return sorted({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "KEPT"}.intersection(os.environ))


worker.handler("thread")(seen)
worker.handler("process", isolation="process")(seen)
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Listen as systemd does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(30)
        yield listening


@pytest.mark.parametrize("processes", [[], ["--processes", "2"]], ids=["one", "two"])
def test_a_worker_reports_that_it_is_ready_and_alive(
    manager: socket.socket, server: nqnb.DevServer, tmp_path: Path, processes: list[str]
) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    settings = {
        "NATS_URL": server.url,
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "200000",
        "KEPT": "1",
    }
    command = [sys.executable, "-m", "nqnb", "worker", "jobs:worker", *processes]
    ready = "READY=1\nSTATUS=serving thread, process"

    async def results() -> list[list[str]]:
        async with nqnb.connect(server.url) as nq:
            return [await (await nq.submit(queue)).result(20) for queue in ("thread", "process")]

    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **settings}, stderr=subprocess.DEVNULL) as worker:
        reports = [manager.recv(1000).decode()]
        assert reports == [ready]
        seen = asyncio.run(results())
        while reports.count("WATCHDOG=1") < 5:
            reports.append(manager.recv(1000).decode())
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    manager.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            reports.append(manager.recv(1000).decode())
    assert seen == [["KEPT"]] * 2, "the programs of a handler must not report to systemd"
    # A worker that stops alone does not report that the whole service is stopping.
    assert set(reports) == {ready, "WATCHDOG=1"}


@pytest.mark.anyio
async def test_a_worker_handles_signals_before_its_log_says_that_it_serves(
    settings: nqnb.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nqnb.worker")
    worker = nqnb.Worker(settings)
    worker.handler("resize")(lambda payload: None)
    handled = []

    class Supervisor(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is serving resize" in record.getMessage():
                handled.append(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
                worker.request_stop()

    supervisor = Supervisor()
    logging.getLogger("nqnb.worker").addHandler(supervisor)
    try:
        await worker.serve()
    finally:
        logging.getLogger("nqnb.worker").removeHandler(supervisor)
    assert handled == [True], "SIGTERM would have killed the worker"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text())
    (tmp_path / "nqnb-worker@.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "nqnb-worker@jobs.service")]
    (tmp_path / "nqnb-worker@jobs.service").write_text(text)
    checked = subprocess.run(command, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
