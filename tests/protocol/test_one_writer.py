"""Only `nqnb.protocol.transition` writes the entries of tasks, so every change of a state is in the explored core."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nqnb

PACKAGE = Path(nqnb.__file__).parent
WRITER = "protocol/transition.py"
WRITES = {"create", "update", "put", "delete", "retire"}
"""The methods of a store that change an entry."""
STATES = {"states", "store", "bucket"}
"""The names under which the code holds the store of the states, with or without an underscore."""
STORES = {
    "jetstream/bucket.py": "implements the store in a bucket",
    "store.py": "declares the store, and implements it in memory",
    "testing/contract.py": "holds the contract of a store",
}
"""Files that write to a store that they are given, and why."""
OTHER_BUCKETS = {
    ("jetstream/presence.py", "self._store"): "the bucket of the workers' presence",
}
"""Stores with such a name that do not hold states, and what they hold."""


def is_states(node: ast.expr, aliases: set[str]) -> bool:
    """Return whether an expression may be the store of the states."""
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_") in STATES
    return isinstance(node, ast.Name) and (node.id.lstrip("_") in STATES or node.id in aliases)


def aliases_in(tree: ast.Module) -> set[str]:
    """Return the local names that are assigned the store of the states."""
    found: set[str] = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            targets = [node.target]
        if targets and isinstance(value := node.value, ast.expr) and is_states(value, set()):  # type: ignore[attr-defined]  # each of the three has one
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def writes_in(source: str, file: str) -> Iterator[str]:
    """Yield where a file may write to the states: a write method of the store, whether it is called or passed on."""
    tree = ast.parse(source)
    aliases = aliases_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in WRITES:
            receiver = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            receiver = node.args[0]
        else:
            continue
        if is_states(receiver, aliases) and (file, ast.unparse(receiver)) not in OTHER_BUCKETS:
            yield f"{file}:{node.lineno}: {ast.unparse(node)}"


def test_only_the_transition_writes_to_the_states() -> None:
    written: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if file != WRITER and file not in STORES:
            written += writes_in(path.read_text(encoding="utf-8"), file)
    assert not written, "\n".join(["the states are written outside of nqnb/protocol/transition.py:", *written])


def test_the_transition_itself_is_seen_to_write() -> None:
    found = list(writes_in((PACKAGE / WRITER).read_text(encoding="utf-8"), WRITER))
    assert {line.rpartition(".")[2] for line in found} == {"create", "update", "delete"}


def test_every_exception_is_needed() -> None:
    for file in STORES:
        assert (PACKAGE / file).is_file(), file
    for file, receiver in OTHER_BUCKETS:
        assert f"{receiver}." in (PACKAGE / file).read_text(encoding="utf-8"), (file, receiver)


@pytest.mark.parametrize(
    "violation",
    [
        "await backend.states.put(key, value)",
        "await self._backend.states.update(key, value, revision)",
        "await nq.backend.states.delete(key)",
        "await self._states.create(key, value)",
        "await store.put(key, value)",
        "await self._bucket.delete(key, 3)",
        "states = backend.states\nstates.create(key, value)",
        "entries: StateStore = backend.states\nentries.update(key, value, 1)",
        "if (kept := backend.states):\n    kept.delete(key)",
        "await backend.insist(lambda: backend.states.create(key, value))",
        "write = backend.states.put",
        "getattr(backend.states, name)(key, value)",
    ],
)
def test_a_write_anywhere_else_is_seen(violation: str) -> None:
    assert list(writes_in(violation, "worker/leases.py"))


@pytest.mark.parametrize(
    "harmless",
    [
        "await backend.states.get(key)",
        "await backend.results.put(key, value)",
        "await backend.intents.create(key, value)",
        "await backend.pauses.delete(queue)",
        "values.update(more)",
        "display.update(table)",
    ],
)
def test_other_stores_and_reads_may_be_used_anywhere(harmless: str) -> None:
    assert not list(writes_in(harmless, "worker/leases.py"))
