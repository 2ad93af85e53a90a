"""The demo ends as expected, and reports every outcome that differs."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import nqnb
from nqnb import demo
from nqnb.cli.render import render
from nqnb.demo import PARCELS, DemoState, Parcel, hash_parcel, make_parcels, run_demo


def test_the_command_reports_every_outcome_as_expected() -> None:
    # The settings of another server, which the demo must ignore.
    other = {"NATS_CA": __file__, "NATS_CREDS": "/no/such"}
    answer = subprocess.run(
        [sys.executable, "-m", "nqnb", "demo", "--json"],
        env={**os.environ, **other, "PYTHONPATH": str(Path(nqnb.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {
        "submitted": PARCELS + 4,
        "completed": PARCELS + 2,
        "failed": 0,
        "cancelled": 1,
        "deleted": 1,
        "retried": 2,
        "scheduled": 1,
        "ok": True,
    }


@pytest.mark.full
def test_on_a_given_server_the_board_fits_and_the_summary_names_the_queues(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_PACE_SECONDS", (0.1, 0.15))
    heights: list[int] = []

    def draw(state: DemoState) -> None:
        for width in (60, 100, 160):
            console = Console(width=width, height=20, file=io.StringIO(), force_terminal=True, color_system=None)
            with console.capture() as captured:
                console.print(render(state))
            lines = captured.get().splitlines()
            assert max(map(len, lines)) <= width
            assert len(lines) < 20 or all(row.status.terminal for row in state.rows)
        heights.append(len(lines))

    summary = asyncio.run(run_demo(nqnb.Settings(server.url), draw))
    assert summary.ok, summary.problems
    assert heights
    assert not summary.temporary
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(summary))
    text = captured.get()
    assert "deleted before it started" in text
    assert "after the request" in text
    assert "2 times" in text
    assert "not started early" in text
    assert all(queue in text for queue in summary.queues)
    assert server.url in text


def test_a_wrong_digest_is_reported(server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACE_SECONDS", (0.1, 0.15))
    monkeypatch.setattr(demo, "digest", lambda parcel: "something else")
    summary = asyncio.run(run_demo(nqnb.Settings(server.url), lambda _: None))
    assert not summary.ok
    assert summary.as_json()["ok"] is False
    assert len(summary.problems) == PARCELS + 2


def test_a_missing_retry_and_an_early_start_are_reported(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_PACE_SECONDS", (0.1, 0.15))
    monkeypatch.setattr(demo, "hash_after_failures", hash_parcel)
    submit = nqnb.Client.submit

    @functools.wraps(submit)
    async def at_once(self: nqnb.Client, *args: Any, process_at: Any = None, **options: Any) -> nqnb.Task:
        return await submit(self, *args, **options)

    monkeypatch.setattr(nqnb.Client, "submit", at_once)
    summary = asyncio.run(run_demo(nqnb.Settings(server.url), lambda _: None))
    assert (summary.completed, summary.retried, summary.scheduled) == (PARCELS + 2, 0, 0)
    assert summary.as_json()["ok"] is False
    retried, early = summary.problems
    assert "ran once, expected 3 times" in retried
    assert "before its scheduled time" in early


def test_a_task_that_fails_too_often_is_reported(server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACE_SECONDS", (0.1, 0.15))

    def fail(job: nqnb.Job, parcel: Parcel) -> None:
        raise OSError("always fails")

    monkeypatch.setattr(demo, "hash_after_failures", fail)
    summary = asyncio.run(run_demo(nqnb.Settings(server.url), lambda _: None))
    assert (summary.failed, summary.retried) == (1, 2)
    (problem,) = summary.problems
    assert "is failed, expected completed" in problem


@pytest.mark.parametrize("count", [1, PARCELS, 60])
def test_make_parcels_returns_the_requested_number(count: int) -> None:
    parcels = make_parcels(count)
    assert len(parcels) == count
    assert all(parcel.files for parcel in parcels)
    assert all(Path(parcel.folder, name).is_file() for parcel in parcels for name in parcel.files)


def test_a_python_without_source_files_uses_those_of_nqnb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    parcels = make_parcels()
    assert len(parcels) == PARCELS
    assert all(parcel.name == "nqnb" for parcel in parcels)
