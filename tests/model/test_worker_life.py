"""The protocol of one task's life holds over every order of its steps, and breaks as soon as one step is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nqnb.protocol.wire import Status

from .explorer import Exploration
from .life_rules import Broken, settled
from .life_scenarios import ALL_ENDS, BREAKS, LONG_WORLDS, WORLDS, exploration_of
from .life_state import Ask, State, as_task

pytestmark = pytest.mark.timeout(600)  # a run of seconds takes minutes beside other tests on a busy machine


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """A million states that stay would make every later collection of garbage take a second."""
    yield
    exploration_of.cache_clear()
    as_task.cache_clear()


def ends(found: Exploration[State]) -> set[tuple[Status, Ask]]:
    over = filter(settled, found.states)
    return {(status_of(state), who.ask) for state in over for who in state.cancellers}


def status_of(state: State) -> Status:
    assert state.entry is not None
    return state.entry.status


SLOW = ("one id, two messages", "a worker cut off", "three quick faults", "the consumer is recreated")
"""The worlds that take most of the time."""


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.full] * (each in SLOW)) for each in WORLDS])
def test_the_protocol_holds(name: str) -> None:
    world = WORLDS[name]
    found = exploration_of(world.model)
    assert not found.broken, found.report()
    assert len(found.states) > world.states
    assert world.steps <= found.steps
    if world.model.cancellers:
        assert ends(found) >= ALL_ENDS
    else:
        assert {status_of(state) for state in filter(settled, found.states)} == {Status.COMPLETED, Status.FAILED}


@pytest.mark.full
@pytest.mark.parametrize("name", LONG_WORLDS)
def test_the_protocol_holds_in_larger_worlds(name: str) -> None:
    found = LONG_WORLDS[name].explore()
    assert not found.broken, found.report()
    assert ends(found) >= ALL_ENDS


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name.lower())
def test_a_wrong_step_is_found(broken: Broken) -> None:
    model, rule = BREAKS[broken]
    assert not exploration_of(model).broken, "this world is broken even without the wrong step"
    found = replace(model, broken=broken).explore()
    assert found.broken == rule, found.report()
    assert found.trace


def test_every_wrong_step_is_tried() -> None:
    assert set(BREAKS) == set(Broken) - {Broken.NOTHING}
