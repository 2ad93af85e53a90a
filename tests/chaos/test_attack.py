"""Attacks: short ones always, long ones with ``--full``; and an attack finds what is broken on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.waiting import until

import nqnb
from nqnb.jetstream.connection import Connection
from nqnb.testing.chaos import DEFAULT_FAULTS, ChaosOptions, Rule
from nqnb.testing.chaos.plan import Moment, plan_tasks


def chaos(*arguments: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    """Run `nqnb chaos`."""
    return subprocess.run(
        [sys.executable, "-m", "nqnb", "chaos", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_same_seed_plans_the_same_attack() -> None:
    plans = [list(plan_tasks(ChaosOptions(tasks=300, seed=seed), 3)) for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert {cancel.aim for plan in plans[0] for cancel in plan.cancels} == set(Moment)


def test_a_short_attack_breaks_no_rule(seed: int) -> None:
    answer = chaos("--tasks", "150", "--seed", str(seed), "--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert report["ok"]
    assert report["breaches"] == []
    assert report["submitted"] == 150
    assert set(report["faults"]) == set(DEFAULT_FAULTS)
    assert sum(sum(ends.values()) for ends in report["cancels"].values()) > 50
    assert report["submit_to_ack"]["count"] == report["acknowledged"]


def test_on_a_given_server_it_asks_and_leaves_nothing(server: nqnb.DevServer) -> None:
    refused = chaos("-u", server.url, "--tasks", "5")
    assert refused.returncode == 1
    assert "add --yes" in refused.stderr
    wrong = chaos("-u", server.url, "--faults", "server", "--yes")
    assert wrong.returncode == 2
    assert "needs a server of the attack's own" in wrong.stderr
    answer = chaos("-u", server.url, "--tasks", "25", "--seed", "3", "--yes", "--faults", "worker")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Every rule held." in answer.stdout
    assert server.url in answer.stdout

    async def streams() -> list[str]:
        connection = await Connection.open(nqnb.Settings(server.url))
        try:
            return list((await connection.api("STREAM.NAMES"))["streams"] or [])
        finally:
            await connection.close()

    assert asyncio.run(streams()) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the processes that are left are looked for in /proc")
def test_ctrl_c_leaves_nothing_running() -> None:
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "nqnb", "chaos", "--tasks", "2000"],
        env={**os.environ, "NQNB_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def marked() -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if alive and f"NQNB_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    until(lambda: sum("chaos.chaos_worker" in each for each in marked()) >= 3, 60, "the workers start", pause=0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, (out, error)
    until(lambda: not marked(), 15, pause=0.1)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", range(3))
def test_a_long_attack_breaks_no_rule(seed: int, run: int) -> None:
    answer = chaos("--tasks", "5000", "--seed", str(seed + run), timeout=880)
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", range(2))
def test_a_cluster_that_loses_leaders_and_its_quorum_breaks_no_rule(seed: int, run: int) -> None:
    answer = chaos("--tasks", "2000", "--seed", str(seed + run), "--faults", "cluster,worker,clock", timeout=880)
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout + answer.stderr


STEP = 1000
"""Tasks of each attack on a broken mechanism; five of them are the most that one may take."""


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("mutation", "faults", "rules"),
    [
        ("put_at_the_claim", ("worker", "server", "link"), {Rule.SECOND_END}),
        ("store_no_cancel_request", ("worker", "server", "link"), {Rule.CLAIMED_LATE, Rule.UNHEARD, Rule.UNASKED}),
        ("register_after_the_claim", ("worker", "link"), {Rule.UNHEARD, Rule.OVERLAP}),
        ("acknowledge_before_the_outcome", ("worker", "full"), {Rule.OPEN}),
    ],
)
def test_a_mechanism_that_is_broken_on_purpose_is_found(
    seed: int, mutation: str, faults: tuple[str, ...], rules: set[Rule]
) -> None:
    program = Path(__file__).with_name("broken_mechanism.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parent)}
    names = {rule.name.lower() for rule in rules}
    for number in range(5):
        command = [sys.executable, str(program), mutation, str(STEP), str(seed + number), *faults]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=880, check=False)
        assert answer.returncode == 0, answer.stderr
        found = Counter(each["rule"] for each in json.loads(answer.stdout)["breaches"])
        if names & set(found):
            print(f"{mutation}: found with seed {seed + number} within {(number + 1) * STEP} tasks: {dict(found)}")
            return
    pytest.fail(f"{mutation} was not found in {5 * STEP} tasks")
