"""What `nqnb chaos` shows on a terminal."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import pytest
from rich.console import Console

from nqnb.cli.render import render
from nqnb.testing.chaos import Breach, ChaosReport, ChaosState, Rule
from nqnb.testing.chaos.plan import Kind, Moment, TaskPlan
from nqnb.testing.chaos.report import Figures, ToldBreach

FAULTS = [(9.2, "the server was killed for 3.9 s", True), (41.0, "worker process 6 was suspended for 4.0 s", False)]


def shown(record: object, width: int, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, force_terminal=True, color_system=None, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(record))
    return [line.rstrip() for line in captured.get().splitlines()]


def report(*breaches: Breach) -> ChaosReport:
    figures = Figures(cancels={moment: Counter(deleted=1, cancelled=2) for moment in Moment})
    timeline = [f"    9.250 s  {'a long event ' * 12}", "   10.500 s  the end"]
    told = [ToldBreach(breach, timeline) for breach in breaches]
    return ChaosReport(5, 9, ("worker",), "a server", 9, 9, 0, 4.5, figures, list(breaches), told, 40)


@pytest.mark.parametrize("width", [80, 130])
def test_the_board_aligns_the_times_of_the_faults(width: int) -> None:
    state = ChaosState("attacking", 43.2, 1000, 640, ended=Counter(completed=300), last_faults=FAULTS)
    lines = shown(state, width)
    assert lines[-2:] == [
        " 9.2 s  the server was killed for 3.9 s",
        "41.0 s  worker process 6 was suspended for 4.0 s",
    ]
    assert len(lines) == len({line for line in lines if line}) + 1, "each line is there once, with one empty line"


def test_the_board_fits_a_low_terminal() -> None:
    state = ChaosState("attacking", tasks=10, ended=Counter(failed=1), faults=Counter(worker=1), last_faults=FAULTS * 9)
    assert len(shown(state, 80, height=14)) < 14


@pytest.mark.parametrize("width", [80, 130])
def test_a_breach_is_reported_with_a_timeline_in_two_columns(width: int) -> None:
    breach = Breach(Rule.AGAIN, "it started again", "t1")
    lines = shown(report(breach), width)
    assert "1 breach with seed 5:" in lines
    assert "task t1 ran again after it had returned: it started again" in lines
    first = next(number for number, line in enumerate(lines) if line.startswith(" 9.250 s  a long event"))
    assert lines[first + 1].startswith(" " * 10)
    assert lines[-1] == "10.500 s  the end"
    assert max(map(len, lines)) <= width
    assert "2 breaches with seed 5:" in shown(report(breach, breach), width)


def test_a_report_without_a_breach_says_so_in_its_last_line() -> None:
    assert shown(report(), 80)[-1] == "Every rule held."


def test_a_report_names_the_acknowledged_revisions_that_the_server_has_lost() -> None:
    lost = dataclasses.replace(report(), lost_writes={f"t{number}": 7 + number for number in range(5)})
    text = " ".join(" ".join(shown(lost, 100)).split())
    assert "lost by the server revision 7 of task t0, revision 8 of task t1, revision 9 of task t2 and 2 more" in text
    assert text.endswith("Every rule held for the tasks that were judged.")
    assert lost.as_json()["lost_writes"]["t4"] == 11
    assert "lost by the server" not in "".join(shown(report(), 100))


def test_a_task_is_described_without_what_is_usual() -> None:
    assert TaskPlan(0, Kind.THREAD, 0.25).told == "thread, 0.250 s"
    unusual = TaskPlan(0, Kind.COROUTINE, 0.0, failures=2, retry=1, wait=0.5, polite=False)
    assert (
        unusual.told
        == "coroutine, 0.000 s, planned failures: 2, retries: 1, due in 0.50 s, never checks for its cancel"
    )
