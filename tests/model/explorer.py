"""Every state that a set of steps can reach, shortest way first, and the trace to the first that breaks a rule."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(slots=True)
class Step(Generic[S]):
    """A step that a state allows: its name, where it leads, and whether it is a fault that need not happen."""

    name: str
    state: S
    fault: bool = False


@dataclass
class Exploration(Generic[S]):
    """The states reached and the names of the steps taken; the rule that broke and the trace to it, if one did."""

    states: list[S]
    steps: set[str]
    broken: str = ""
    trace: list[tuple[str, S]] = field(default_factory=list)

    def report(self) -> str:
        """The trace as text, one step a line."""
        lines = [f"{name:<24} {state}" for name, state in self.trace]
        return "\n".join([f"{self.broken} (after {len(self.states)} states)", *lines])


def explore(
    initial: S,
    steps: Callable[[S], Iterable[Step[S]]],
    broken: Callable[[S, S], str],
    settled: Callable[[S], bool],
    alike: Callable[[S], S],
    most: int,
) -> Exploration[S]:
    """Explore breadth first.

    Args:
        initial: the state at the beginning.
        steps: the steps that a state allows.
        broken: the rule that a step from one state to the next breaks, or ``""``.
        settled: whether nothing is left to do. Such a state must stay reachable from every state without faults. This
            is stronger than the absence of deadlocks, because it also finds endless loops.
        alike: returns the state that stands for all states that differ from it in nothing that matters.
        most: the number of states above which the exploration fails.
    """
    states = [initial]
    taken: set[str] = set()
    number = {initial: 0}
    came_from: list[tuple[int, str]] = [(-1, "")]
    predecessors: list[list[int]] = [[]]
    for here, state in enumerate(states):  # it grows while it is walked
        for step in steps(state):
            name = step.name
            taken.add(name)
            rule = broken(state, step.state)
            after = alike(step.state)
            there = number.get(after)
            if there is None:
                there = number[after] = len(states)
                states.append(after)
                came_from.append((here, name))
                predecessors.append([])
            if rule:
                trace = [*_trace(here, states, came_from), (name, after)]
                return Exploration(states, taken, rule, trace)
            if not step.fault:
                predecessors[there].append(here)
        if len(states) > most:
            raise RuntimeError(f"more than {most} states")
    stuck = _first_that_never_settles(states, settled, predecessors)
    if stuck is not None:
        return Exploration(states, taken, "stuck: it can never settle", _trace(stuck, states, came_from))
    return Exploration(states, taken)


def _first_that_never_settles(
    states: list[S], settled: Callable[[S], bool], predecessors: list[list[int]]
) -> int | None:
    todo = [index for index, state in enumerate(states) if settled(state)]
    settles = bytearray(len(states))
    for index in todo:
        settles[index] = True
    while todo:
        for before in predecessors[todo.pop()]:
            if not settles[before]:
                settles[before] = True
                todo.append(before)
    first = settles.find(0)
    return None if first < 0 else first


def _trace(index: int, states: list[S], came_from: list[tuple[int, str]]) -> list[tuple[str, S]]:
    trace = []
    while index > 0:
        before, name = came_from[index]
        trace.append((name, states[index]))
        index = before
    return trace[::-1]
