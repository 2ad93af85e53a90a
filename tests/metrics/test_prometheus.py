"""A real Prometheus scrapes a worker and the exporter: alerts fire and clear, and each panel shows data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.scrape import exporting, free_port
from helpers.waiting import until_async

import nqnb
from nqnb.commands.exporter_command import DEFAULT_PORT
from nqnb.concurrency import spawn

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
MISSING = [program for program in ("prometheus", "promtool") if shutil.which(program) is None]
SHORTER = [(r"for: \d+m", "for: 1s"), (r"\[\d+m\]", "[4s]"), ("> 600", "> 1.5")]
"""The rules with intervals that a test can wait for."""


@pytest.fixture(autouse=True)
def prometheus_is_installed() -> None:
    """Skip the tests where Prometheus is missing; fail in CI."""
    if MISSING and os.environ.get("CI") == "true":
        pytest.fail("the tests of metrics lack prometheus (apt-get install prometheus)", pytrace=False)
    if MISSING:
        pytest.skip("the tests of metrics lack prometheus (apt-get install prometheus)")


def promtool(*arguments: str, cwd: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool") or ""
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def rules() -> dict[str, str]:
    """Return the text of each alert rule, by name."""
    text = (MONITORING / "alerts.yml").read_text()
    return {each.split("\n", 1)[0]: each for each in text.split("- alert: ")[1:]}


def expressions() -> Iterator[tuple[str, str]]:
    """Return (panel, expression) of each query of the dashboard."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    async def get(self, path: str, **query: str) -> Any:
        def read() -> Any:
            url = f"{self._url}/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  http only
                return json.loads(answer.read())["data"]

        with contextlib.suppress(OSError):
            return await asyncio.to_thread(read)
        return {}

    async def numbers(self, expression: str) -> list[float]:
        """Return the result of an expression, without what is not a number."""
        found = (await self.get("query", query=expression)).get("result", [])
        return [number for each in found if not math.isnan(number := float(each["value"][1]))]

    async def firing(self) -> set[str]:
        """Return the alerts that fire."""
        alerts = (await self.get("alerts")).get("alerts", [])
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}


@contextlib.asynccontextmanager
async def monitored(folder: Path, exporter: int, worker: int) -> AsyncIterator[Prometheus]:
    """Run a Prometheus with our configuration and rules, at short intervals and other ports."""
    config = (MONITORING / "prometheus.yml").read_text().replace("15s", "1s")
    for usual, chosen in ((DEFAULT_PORT, exporter), (9464, worker)):
        assert f'["localhost:{usual}"]' in config
        config = config.replace(f"localhost:{usual}", f"127.0.0.1:{chosen}")
    alerts = (MONITORING / "alerts.yml").read_text()
    for pattern, new in SHORTER:
        alerts, count = re.subn(pattern, new, alerts)
        assert count, pattern
    (folder / "prometheus.yml").write_text(config)
    (folder / "alerts.yml").write_text(alerts)
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen([*command, "--web.listen-address", f"127.0.0.1:{port}", "--log.level", "error"])
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        process.wait()


def new_worker(settings: nqnb.Settings, port: int) -> nqnb.Worker:
    worker = nqnb.Worker(settings, metrics=f"127.0.0.1:{port}")

    @worker.handler("q", backoff=nqnb.Backoff(0.05, 0.05))
    async def handle(job: nqnb.Job, payload: str) -> None:
        await asyncio.sleep(60 if payload == "slow" else 0.01)
        if payload == "bad":
            raise ValueError

    return worker


async def use(nq: nqnb.Client) -> None:
    """Submit, retry, fail and cancel tasks, until cancelled."""
    while True:
        slow = await nq.submit("q", "slow")
        await asyncio.gather(nq.submit("q", "ok"), nq.submit("q", "bad", retry=1))
        await asyncio.sleep(0.3)
        await slow.cancel()


def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    for check in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = promtool(*check)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("expression", ["vector(0) > 1", pytest.param("vector(1)", marks=pytest.mark.full)])
def test_the_rules_tests_notice_an_alert_that_never_or_always_fires(expression: str, tmp_path: Path) -> None:
    text = (MONITORING / "alerts.yml").read_text()
    changed = re.sub(r"expr: .*?(?=\n +(?:for|labels):)", f"expr: {expression}", text, flags=re.DOTALL)
    (tmp_path / "alerts.yml").write_text(changed)
    shutil.copy(MONITORING / "alerts_test.yml", tmp_path)
    said = promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)
    assert set(re.findall(r"alertname: ?(\w+)", said.stdout + said.stderr)) == set(rules())


def test_each_alert_has_a_section_in_the_docs() -> None:
    headings = re.findall(r"^### (Nqnb\w+)$", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    assert headings == list(rules())
    for name, rule in rules().items():
        assert f"See {name} in docs/operating.md." in rule


@pytest.mark.full
async def test_every_panel_of_the_dashboard_has_data(settings: nqnb.Settings, nq: nqnb.Client, tmp_path: Path) -> None:
    port = free_port()
    queries = [(panel, each.replace("$queue", "q").replace("$__rate_interval", "10s")) for panel, each in expressions()]
    assert len(queries) > 25
    missing = queries

    async def all_answered() -> bool:
        nonlocal missing
        missing = [(panel, each) for panel, each in missing if not await prometheus.numbers(each)]
        return not missing

    async with (
        exporting(nq) as exporter,
        monitored(tmp_path, exporter, port) as prometheus,
        new_worker(settings, port),
    ):
        using = spawn(use(nq))
        try:
            await until_async(all_answered, what="every panel has data", pause=0.3)
        except AssertionError:
            pytest.fail(f"no data: {missing}")
        finally:
            using.cancel()
            await asyncio.wait({using})
        assert await prometheus.numbers('up{job="nqnb-worker"}') == [1]
        assert await prometheus.numbers('nqnb_tasks{queue="q",state="completed"}') > [0]


@pytest.mark.full
async def test_a_stuck_queue_fires_its_alerts_and_a_worker_clears_them(
    settings: nqnb.Settings, nq: nqnb.Client, tmp_path: Path
) -> None:
    port = free_port()
    stuck = {"NqnbNoWorker", "NqnbOldestPending"}
    async with exporting(nq) as exporter, monitored(tmp_path, exporter, port) as prometheus:
        await nq.submit("q", "ok")

        async def fires() -> bool:
            return stuck <= await prometheus.firing()

        async def is_clear() -> bool:
            return not stuck & await prometheus.firing()

        await until_async(fires, 60, "the alerts fire", pause=0.2)
        async with new_worker(settings, port):
            await until_async(is_clear, 60, "the alerts clear", pause=0.2)
