"""Chaos runs: short ones always, long ones with ``--full``; and runs on a mechanism that is broken on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from helpers.command_line import environment
from helpers.waiting import until

import nqnb
import nqnb.testing
from nqnb.errors import RevisionConflict
from nqnb.jetstream.bucket import KeyValueStore
from nqnb.jetstream.connection import Connection
from nqnb.testing.chaos import DEFAULT_FAULTS, ChaosOptions, Rule
from nqnb.testing.chaos.chaos_worker import note_acknowledged_writes
from nqnb.testing.chaos.evidence import read_diary
from nqnb.testing.chaos.plan import LIMITS, Kind, Moment, plan_tasks
from nqnb.testing.chaos.testbed import ChaosWorkers
from nqnb.testing.chaos.workload import LocalClient, RemoteClient, Workload

needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="the test looks for processes in /proc")


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
    kinds = Counter(plan.kind for plan in plans[0][:100])
    # Even a short attack submits more tasks to a queue with limits than may run or start at once.
    assert all(kinds[kind] > 15 for kind in LIMITS)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tasks": "5"}, "tasks='5' is invalid: expected a whole number"),
        ({"tasks": 0}, "tasks=0 is invalid: out of range"),
        ({"workers": 1}, "workers=1 is invalid: out of range"),
        ({"concurrency": None}, "concurrency=None is invalid: expected a whole number"),
        ({"seed": 1.5}, "seed=1.5 is invalid: expected a whole number"),
        ({"minutes": "1"}, "minutes='1' is invalid: must be a number greater than 0"),
        ({"minutes": 0}, "minutes=0 is invalid: must be a number greater than 0"),
        ({"ack_wait": "3"}, "ack_wait='3' is invalid: expected a duration"),
        ({"faults": "worker"}, "faults='worker' is invalid: expected a tuple of names, got type str"),
        ({"faults": None}, "faults=None is invalid: expected a tuple of names"),
        ({"faults": ("worker", 5)}, "faults are invalid: 5 is unknown"),
        ({"settings": "nats://127.0.0.1"}, "settings='nats://127.0.0.1' is invalid: expected a Settings"),
    ],
)
def test_the_options_of_an_attack_are_checked(options: dict[str, Any], error: str) -> None:
    with pytest.raises(nqnb.BadInput, match=re.escape(error)):
        ChaosOptions(**options)


def test_the_chaos_page_says_how_to_start_an_attack_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).parents[2].joinpath("docs/chaos.md").read_text(encoding="utf-8")
    imported, call = re.findall(r"`((?:from|report =) [^`]+)`", text)
    names: dict[str, Any] = {}
    exec(imported, names)  # noqa: S102  that is what is tested
    options = eval(call.removeprefix("report = await run_chaos(").removesuffix(")"), names)  # noqa: S307  as above
    assert options == ChaosOptions(tasks=500, seed=1)
    monkeypatch.delitem(vars(nqnb.testing), "chaos")
    assert nqnb.testing.chaos.run_chaos is names["run_chaos"]


@pytest.mark.timeout(300)  # it takes a minute, and more beside other tests on a busy machine
def test_a_short_attack_breaks_no_rule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The settings of another server, which the processes of the attack must ignore.
    monkeypatch.setenv("NATS_CA", __file__)
    monkeypatch.setenv("NATS_CREDS", "/no/such")
    answer = chaos("--tasks", "100", "--seed", str(seed), "--json", timeout=280)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    assert report["ok"]
    assert report["breaches"] == []
    assert report["submitted"] == 100
    assert set(report["faults"]) == set(DEFAULT_FAULTS)
    assert sum(sum(ends.values()) for ends in report["cancels"].values()) > 30
    assert report["submit_to_ack"]["count"] == report["acknowledged"]


@pytest.mark.full
def test_on_a_given_server_it_asks_and_leaves_nothing(server: nqnb.DevServer) -> None:
    refused = chaos("-u", server.url, "--tasks", "5")
    assert refused.returncode == 1
    assert "Add --yes" in refused.stderr
    wrong = chaos("-u", server.url, "--faults", "server", "--yes")
    assert wrong.returncode == 2
    assert "only into servers that the attack starts" in wrong.stderr
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


def processes_with(mark: str) -> dict[int, tuple[str, str]]:
    """Return the state and the command line of each process with a mark in its environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"NQNB_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = state, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


@pytest.fixture
def attack() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A long attack whose workers are killed and suspended, and the mark of its processes."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "nqnb", "chaos", "--tasks", "20000", "--faults", "worker,clock"],
        env={**os.environ, "NQNB_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    yield process, mark
    process.kill()
    process.communicate()
    for pid in processes_with(mark):
        os.kill(pid, signal.SIGKILL)


def workers_of(mark: str) -> list[str]:
    """Return the states of the worker processes of an attack."""
    return [state for state, command in processes_with(mark).values() if "chaos.chaos_worker" in command]


@needs_proc
def test_ctrl_c_leaves_no_process(attack: tuple[subprocess.Popen[bytes], str]) -> None:
    process, mark = attack
    until(lambda: len(workers_of(mark)) >= 3, 60, "the workers start", pause=0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, (out, error)
    until(lambda: not processes_with(mark), 15, pause=0.1)


@pytest.mark.full
@needs_proc
def test_a_killed_attack_leaves_no_process_not_even_a_suspended_one(
    attack: tuple[subprocess.Popen[bytes], str],
) -> None:
    process, mark = attack
    until(lambda: "T" in workers_of(mark), 90, "a worker is suspended", pause=0.05)
    process.kill()
    process.wait()
    until(lambda: not processes_with(mark), 30, pause=0.1)


def test_a_worker_process_that_ends_by_itself_is_reported(tmp_path: Path) -> None:
    orders = {"settings": {"url": "nats://127.0.0.1:1"}, "queues": {}, "concurrency": 1, "prelude": "os:abort"}
    workers = ChaosWorkers(tmp_path, orders, [{"settings": {}, "clock": 0.0}])
    workers.start(0)
    assert until(workers.note_crashes, 30) == [0]
    assert workers.crashes == [f"worker process 0 exited unexpectedly with code {-signal.SIGABRT}"]
    assert workers.number_at(0) is None


class Fails:
    """A client of which every call fails with an error that is not nqnb's."""

    async def submit(self, *arguments: Any, **options: Any) -> nqnb.Task:
        raise KeyError("a defect")

    cancel = submit


@pytest.mark.anyio
async def test_an_error_of_a_client_that_is_not_from_the_error_tree_is_reported() -> None:
    options = ChaosOptions(tasks=20, seed=1)
    clients = [LocalClient(cast("nqnb.Client", Fails()))]
    queues = {kind.value: kind.value for kind in Kind}
    workload = Workload(list(plan_tasks(options, 1)), clients, queues, 8, time.monotonic() + 60)
    workload.fully_faulted.set()
    await workload.run()
    assert len(workload.crashes) >= 20
    assert all("KeyError" in crash and "a defect" in crash for crash in workload.crashes)


@pytest.mark.anyio
async def test_a_client_process_that_ends_by_itself_answers_and_is_reported() -> None:
    client = RemoteClient({"url": "nats://127.0.0.1:1", "retry_for": 0.1}, 0.0, os.environ)
    await client.start()
    for _ in range(3):
        answer = await asyncio.wait_for(client.perform({"do": "cancel", "task": "a"}), 30)
        assert answer.error == "ConnectionFailed"
    assert await client.stop() == ["the client with the wrong clock exited unexpectedly with code 1"]
    assert await client.stop() == []


@pytest.mark.anyio
async def test_a_worker_process_notes_each_write_that_the_server_has_acknowledged(
    nq: nqnb.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyValueStore, "update", KeyValueStore.update)  # restored after the test
    note_acknowledged_writes(str(tmp_path / "diary"))
    states = nq.backend.states
    first = await states.create("a", b"1")
    second = await states.update("a", b"2", first)
    with pytest.raises(RevisionConflict):
        await states.update("a", b"3", first)
    lines = read_diary(tmp_path / "diary", 4)
    assert [(line.task, line.attempt, line.word, line.number) for line in lines] == [("a", second, "stored", 4)]


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


MUTATIONS = [
    ("put_at_the_claim", ("worker", "server", "link"), {Rule.SECOND_END}),
    ("store_no_cancel_request", ("worker", "server", "link"), {Rule.CLAIMED_LATE, Rule.UNHEARD, Rule.UNASKED}),
    ("register_after_the_claim", ("worker", "link"), {Rule.UNHEARD, Rule.OVERLAP}),
    ("acknowledge_before_the_outcome", ("worker", "full"), {Rule.OPEN}),
    ("take_over_slots", ("worker",), {Rule.CROWDED}),
    ("reserve_starts_alone", ("clock",), {Rule.HASTY}),
]


@pytest.mark.parametrize("mutation", [name for name, _, _ in MUTATIONS])
def test_each_mutation_breaks_code_that_runs(mutation: str) -> None:
    program = Path(__file__).with_name("broken_mechanism.py")
    answer = subprocess.run(
        [sys.executable, str(program), mutation], env=environment(), capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == [mutation]


STEP = 1000
"""Tasks of each attack on a broken mechanism; five of them are the most that one may take."""


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("mutation", "faults", "rules"),
    MUTATIONS,
)
def test_a_mechanism_that_is_broken_on_purpose_is_found(
    seed: int, mutation: str, faults: tuple[str, ...], rules: set[Rule]
) -> None:
    program = Path(__file__).with_name("broken_mechanism.py")
    path = {"PYTHONPATH": str(program.parent)}
    names = {rule.name.lower() for rule in rules}
    for number in range(5):
        command = [sys.executable, str(program), mutation, str(STEP), str(seed + number), *faults]
        answer = subprocess.run(
            command, env={**os.environ, **path}, capture_output=True, text=True, timeout=880, check=False
        )
        assert answer.returncode == 0, answer.stderr
        found = Counter(each["rule"] for each in json.loads(answer.stdout)["breaches"])
        if names & set(found):
            print(f"{mutation}: found with seed {seed + number} within {(number + 1) * STEP} tasks: {dict(found)}")
            return
    pytest.fail(f"{mutation} was not found in {5 * STEP} tasks")
