"""The operations of `nqnb.protocol` keep the rules over every order of their steps, and a wrong step breaks one."""

from __future__ import annotations

import ast
import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import nqnb.protocol

from .coroutine_states import frozen, functions_seen
from .report import report
from .room_scenarios import LARGE_SCENARIOS, OPERATIONS, SCENARIOS, SLOW_VARIANTS, VARIANTS, summary_of
from .simulated_server import Call

pytestmark = pytest.mark.timeout(600)  # a run of seconds takes minutes beside other tests on a busy machine

NOT_EXPLORED = {
    "bulk": "the loops over many tasks run in sequence here; errors about unknown queues change nothing",
    "follow": "reads only",
    "serving": "reads only",
    "cancel.cancel_each": "cancels one task after the other",
    "cancel.cancel_many": "cancels one task after the other",
    "cancel.cancel_one": "cancels, and waits for the end of the run",
    "cancel._super_after_write": "runs, and waits for no request",
    "cancel.after_read": "no read fails here",
    "claim.after_write": "runs, and waits for no request",
    "delete._refuse_if_in_use": "a delete without force only looks, and then removes what is empty",
    "finish.after_read": "no read fails here",
    "finish.after_write": "runs, and waits for no request",
    "heartbeat._look": "the hint to look early; the look itself is explored",
    "heartbeat._open": "the hint to look early; the look itself is explored",
    "heartbeat.check_entry": "runs, and waits for a request only where a Go client wrote the entry",
    "heartbeat.check_progress": "progress is not written here",
    "heartbeat.note_intent": "only for the cancels of Go clients",
    "heartbeat.renew": "the explorer decides which lease is lost",
    "heartbeat.write_progress": "progress is not written here",
    "prune._remove_result": "no result is too large for its entry here",
    "keyed": "chooses an id; the cancel and the submit that follow are explored",
    "recurring.remove_schedule": "deletes one entry, and changes no task",
    "recurring.run_schedule": "reads the schedule; the submit that follows is explored",
    "slots._look": "measures time; the explorer decides whether a holder is over",
    "slots.still_held": "measures time; the explorer decides whether a holder is over",
    "transition.after_write": "runs, and waits for no request",
    "transition.let_expire": "no entry expires here",
    "transition.rest": "runs, and waits for no request",
}
"""By file, or by file and function: why no process was seen waiting in it."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Runs that fail on purpose would fill the log."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order_of_the_steps_keeps_the_rules(name: str) -> None:
    found = summary_of(SCENARIOS[name])
    assert not found.rule, found.text
    assert found.states > 100
    assert all(client.name in " ".join(found.steps) for client in SCENARIOS[name].clients)


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE_SCENARIOS)
def test_every_order_of_the_steps_keeps_the_rules_in_larger_scenarios(name: str) -> None:
    found = summary_of(LARGE_SCENARIOS[name])
    assert not found.rule, found.text


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.full] * (each in SLOW_VARIANTS)) for each in VARIANTS]
)
def test_a_wrong_step_breaks_its_rule(name: str) -> None:
    variant = VARIANTS[name]
    sound = summary_of(variant.scenario)
    assert not sound.rule, f"the scenario breaks a rule even without the wrong step: {sound.text}"
    found = summary_of(variant.broken)
    assert found.rule == variant.rule, found.text
    assert found.trace


def test_the_report_names_every_operation_with_its_states_and_variants(capsys: pytest.CaptureFixture[str]) -> None:
    report()
    text = capsys.readouterr().out
    print(text)
    for operation in OPERATIONS:
        assert f"\n{operation} " in text
    assert all(name.partition(": ")[2] in text for name in VARIANTS if name not in SLOW_VARIANTS)
    assert {name.partition(":")[0] for name in VARIANTS} >= set(OPERATIONS)


def test_every_coroutine_of_the_protocol_is_explored() -> None:
    for scenario in SCENARIOS.values():
        summary_of(scenario)
    unseen = {
        f"{path.stem}.{name}"
        for path in Path(nqnb.protocol.__path__[0]).glob("*.py")
        for name in waiting_functions(path)
        if (path.stem, name) not in functions_seen
    }
    assert not {name for name in unseen if name not in NOT_EXPLORED and name.partition(".")[0] not in NOT_EXPLORED}


def waiting_functions(path: Path) -> set[str]:
    """Return the coroutines of a file that await something; what an interface declares awaits nothing."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AsyncFunctionDef)
        and any(isinstance(part, (ast.Await, ast.AsyncFor, ast.AsyncWith)) for part in ast.walk(node))
    }


async def two_loops(outer: list[int], inner: list[int]) -> None:
    for _ in outer:
        for _ in inner:
            await Call("step")


def test_two_rounds_of_a_loop_are_two_positions() -> None:
    waiting = two_loops([1, 1], [2, 2])
    seen = set()
    for _ in range(4):
        waiting.send(None)
        seen.add(frozen(waiting))
    waiting.close()
    assert len(seen) == 4


async def same_place(value: int) -> int:
    await Call("step")
    await asyncio.sleep(0)
    return value


def test_two_coroutines_at_one_place_differ_by_their_variables() -> None:
    one, same, other = same_place(1), same_place(1), same_place(2)
    for waiting in (one, same, other):
        waiting.send(None)
    assert frozen(one) == frozen(same) != frozen(other)
    for waiting in (one, same, other):
        waiting.close()
