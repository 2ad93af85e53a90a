"""Which room may import from which: every import of the package, held against one table.

Imports for type checkers only are exempt, since they bind nothing at run time. Those inside functions are not: they
decide when a room is loaded, not whether it may be.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nqnb

ROOMS = [
    "version",
    "concurrency clock error_text",
    "errors",
    "protocol.names decode",
    "protocol.wire",
    "inputs",
    "retry protocol.lifecycle records payload",
    "text",
    "settings",
    "store",
    "jetstream",
    "protocol",
    "task connected housekeeping client",
    "cancelling",
    "worker",
    "server.supervisor server.binary",
    "server",
    "nqnb",
    "frames",
    "demo testing",
    "commands",
    "cli __main__",
    "widgets",
    "notebook",
]
"""From the ground up: each room imports from itself and from the rows above it. ``nqnb`` is the package's own face."""

NEIGHBOURS = {("client", "task"), ("client", "housekeeping"), ("housekeeping", "connected"), ("__main__", "cli")}
"""Imports within one row: (who, from whom)."""

ALONE: dict[str, set[str]] = {
    "server.supervisor": set(),
    "server.binary": {"errors", "protocol.names"},
    "server": {"errors", "error_text", "inputs", "settings", "protocol.names", "server.supervisor", "server.binary"},
}
"""Rooms that import from these only, whatever stands above them."""

OUTSIDE = {
    "nats": {"jetstream"},
    "pandas": {"frames", "widgets", "notebook"},
    "ipywidgets": {"widgets", "notebook"},
    "anywidget": {"widgets", "notebook"},
    "IPython": {"notebook", "widgets"},
    "traitlets": {"notebook", "widgets"},
    "pytest": {"testing"},
    "pickle": {"worker"},
    "cloudpickle": {"worker"},
    "click": {"commands", "cli", "notebook", "demo"},
    "rich": {"cli", "commands"},
}
"""Libraries that only these rooms import."""

PACKAGE = Path(nqnb.__file__).parent
ROW = {room: number for number, row in enumerate(ROOMS) for room in row.split()}


def room_of(module: str) -> str:
    """The room of a module's dotted name: ``nqnb.worker.run`` is in ``worker``, ``nqnb`` in ``nqnb``."""
    own = module.partition(".")[2]
    return own if own in ROW else own.split(".")[0] or module


def is_module(module: str) -> bool:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield child
        yield from runtime_nodes(child)


def imports_of(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """The line and dotted name of each module that a module imports when it runs."""
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*here, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            for imported in dict.fromkeys(name if is_module(name) else base for name in full):
                yield node.lineno, imported


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def every_import() -> Iterator[tuple[str, str, str]]:
    """(where it stands, the module that imports, the module imported), all over the package."""
    for path, module in modules():
        source = path.read_text(encoding="utf-8")
        for line, imported in imports_of(source, module, package=path.name == "__init__.py"):
            yield f"{path.relative_to(PACKAGE.parent)}:{line}", module, imported


def within() -> Iterator[tuple[str, str, str]]:
    """The imports of one room from another: (where, who, from whom)."""
    for where, module, imported in every_import():
        ours, theirs = room_of(module), room_of(imported)
        if imported.partition(".")[0] == "nqnb" and ours != theirs:
            yield where, ours, theirs


def test_every_room_is_in_the_table() -> None:
    missing = sorted({room_of(module) for _, module in modules()} - set(ROW))
    assert not missing, f"say in ROOMS where {', '.join(missing)} belongs: above what it serves, below what it uses"


def test_each_room_imports_only_from_rows_above_it() -> None:
    wrong = [
        f"{where}: {ours} imports {theirs}"
        for where, ours, theirs in within()
        if (ours, theirs) not in NEIGHBOURS and ROW.get(theirs, 99) >= ROW.get(ours, 0)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ALONE)
def test_some_rooms_stand_nearly_alone(room: str) -> None:
    wrong = [f"{where}: imports {theirs}" for where, ours, theirs in within() if ours == room]
    wrong = [line for line in wrong if line.rpartition(" ")[2] not in ALONE[room]]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", OUTSIDE)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{where}: imports {imported}"
        for where, module, imported in every_import()
        if imported.partition(".")[0] == library and room_of(module) not in OUTSIDE[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_worker_may_use_the_jetstream_room_and_not_the_other_way_round() -> None:
    pairs = {(ours, theirs) for _, ours, theirs in within()}
    assert ("worker", "jetstream") in pairs
    assert ("jetstream", "worker") not in pairs


def test_the_parser_sees_what_it_should() -> None:
    source = """
from __future__ import annotations
import nats.errors
from nqnb.protocol import names
from nqnb.protocol.wire import Status
from nqnb import Client
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nqnb.client import Client
else:
    import pandas
def late():
    from nqnb.jetstream.backend import Backend
    try:
        from . import run
    except ImportError:
        from .. import store
"""
    found = {imported for _, imported in imports_of(source, "nqnb.worker.worker")}
    assert found == {
        "__future__",
        "nats.errors",
        "nqnb.protocol.names",
        "nqnb.protocol.wire",
        "nqnb",
        "typing",
        "pandas",
        "nqnb.jetstream.backend",
        "nqnb.worker.run",
        "nqnb.store",
    }
