"""The shape of the package: who may import from whom, no circles, no name twice, no private member from outside.

Every import counts: at the top of a module, inside a function, and for type checkers only. `house_figures` reads them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from house_figures import (
    Module,
    circles,
    every_import,
    imports_of,
    modules,
    private_accesses,
    repeated_classes,
    repeated_files,
)

import nqnb

ROOMS = [
    "version",
    "concurrency clock error_text garbage log_format protocol.status supervisor",
    "errors",
    "protocol.names decode",
    "protocol.wire",
    "inputs listen_address json_types",
    "retry protocol.lifecycle records payload recurrence",
    "text failures column_fit tracing",
    "task_values",
    "settings",
    "store http_endpoint",
    "queue_limits",
    "server.binary",
    "server",
    "jetstream protocol",
    "batch doctor",
    "client",
    "metrics",
    "worker",
    "nqnb",
    "task_frame",
    "frames",
    "demo testing",
    "widgets",
    "top",
    "commands",
    "cli __main__",
    "notebook",
]
"""From the ground up: each room imports from itself and from the rows above it; rooms of one row know nothing of each
other. ``nqnb`` is the package's own face."""

NEIGHBOURS = {
    ("__main__", "cli"),
}
"""Imports within one row: (who, from whom)."""

ALONE: dict[str, set[str]] = {
    "supervisor": set(),
    "server.binary": {"errors", "protocol.names"},
    "server": {"errors", "error_text", "inputs", "settings", "protocol.names", "supervisor", "server.binary"},
}
"""Rooms that import from these only, whatever stands above them."""

OUTSIDE = {
    "nats": {"jetstream"},
    "pandas": {"task_frame", "frames", "widgets", "notebook"},
    "ipywidgets": {"widgets", "notebook"},
    "anywidget": {"widgets", "notebook"},
    "IPython": {"notebook", "widgets"},
    "traitlets": {"notebook", "widgets"},
    "pytest": {"testing"},
    "pickle": {"worker"},
    "cloudpickle": {"worker"},
    "click": {"commands", "cli", "notebook", "demo"},
    "rich": {"cli", "commands", "top"},
    "textual": {"top"},
    "prometheus_client": {"metrics"},
    "cronsim": {"recurrence"},
    "opentelemetry": {"tracing"},
}
"""Libraries that only these rooms import, for type checkers too."""

PRIVATE_ACCESSES = {
    ("nqnb.jetstream.fast_client", "subscription._id"): "nats-py has no public way; a release without it is detected",
    ("nqnb.jetstream.fast_client", "subscription._stop_processing"): "nats-py has no public way",
    ("nqnb.jetstream.fast_client", "subscription._pending_queue"): "nats-py has no public way",
    ("nqnb.notebook.comm_pump", "kernel._parent_ident"): "ipykernel has no public way",
    ("nqnb.notebook.comm_pump", "kernel._publish_status"): "ipykernel has no public way",
    ("nqnb.notebook.tracebacks", "error._render_traceback_"): "IPython calls this hook of an exception",
    ("nqnb.widgets.jupyter_compat", "comm._reply_subshell_for"): "ipykernel has no public way",
}
"""Accesses to private members of other libraries, and why. The list may only shrink."""

RAW_CONNECTION = {"jetstream", "testing"}
"""Rooms that may use a backend's connection itself; chaos tests disturb the server with it."""

VAGUE_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "tools", "stuff", "base", "lib"}

PACKAGE = Path(nqnb.__file__).parent
ROW = {room: number for number, row in enumerate(ROOMS) for room in row.split()}


def room_of(module: str) -> str:
    """Return the room of a module's dotted name: ``nqnb.worker.run`` is in ``worker``, ``nqnb`` in ``nqnb``."""
    own = module.partition(".")[2]
    return own if own in ROW else own.split(".")[0] or module


def imports_between_rooms() -> list[tuple[str, str, str]]:
    """Return the imports of one room from another: (where it stands, who imports, from whom)."""
    return [
        (f"{importer}:{line}", room_of(importer), room_of(imported))
        for line, importer, imported in every_import(PACKAGE)
        if imported.partition(".")[0] == "nqnb" and room_of(importer) != room_of(imported) and importer != "nqnb"
    ]


def test_every_room_is_in_the_table() -> None:
    missing = sorted({room_of(module) for module in modules(PACKAGE)} - set(ROW))
    assert not missing, f"add {', '.join(missing)} to ROOMS: above the rooms that import from it, below what it imports"


def test_each_room_imports_only_from_rows_above_it() -> None:
    wrong = [
        f"{where}: {importer} imports {imported}"
        for where, importer, imported in imports_between_rooms()
        if (importer, imported) not in NEIGHBOURS and ROW.get(imported, 99) >= ROW.get(importer, 0)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ALONE)
def test_some_rooms_import_from_few_others(room: str) -> None:
    wrong = [
        f"{where}: imports {imported}"
        for where, importer, imported in imports_between_rooms()
        if importer == room and imported not in ALONE[room]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", OUTSIDE)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    wrong = [
        f"{importer}:{line}: imports {imported}"
        for line, importer, imported in every_import(PACKAGE)
        if imported.partition(".")[0] == library and room_of(importer) not in OUTSIDE[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles_of_imports() -> None:
    found = circles(PACKAGE)
    assert not found, "these modules import each other: " + "; ".join(", ".join(group) for group in found)


def test_no_file_name_occurs_twice_in_the_package() -> None:
    repeated = repeated_files(PACKAGE)
    assert not repeated, f"give each of these files a name of its own: {repeated}"


def test_no_file_name_occurs_twice_in_the_tests() -> None:
    assert not repeated_files(Path(__file__).parent)


def test_no_class_name_occurs_twice() -> None:
    repeated = repeated_classes(PACKAGE)
    assert not repeated, f"give each of these classes a name of its own: {repeated}"


def test_no_private_member_is_accessed_from_another_class_or_module() -> None:
    found = {(module, text): line for line, module, text in private_accesses(PACKAGE)}
    wrong = [
        f"{module}:{line}: {text}" for (module, text), line in found.items() if (module, text) not in PRIVATE_ACCESSES
    ]
    assert not wrong, "\n".join(wrong)
    assert found.keys() == PRIVATE_ACCESSES.keys(), "remove from PRIVATE_ACCESSES what is no longer accessed"


def test_only_the_jetstream_room_uses_a_backends_connection() -> None:
    wrong = [
        f"{module.name}:{node.lineno}: {ast.unparse(node)}"
        for module in modules(PACKAGE).values()
        if room_of(module.name) not in RAW_CONNECTION
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and node.attr == "connection" and "backend" in ast.unparse(node.value)
    ]
    assert not wrong, "give Backend a method for this: " + "; ".join(wrong)


def test_no_file_name_says_nothing() -> None:
    vague = [module for module in modules(PACKAGE) if module.rpartition(".")[2].strip("_") in VAGUE_NAMES]
    assert not vague, f"name the topic of {', '.join(vague)}"


def parsed(source: str, name: str) -> Module:
    return Module(name, Path(f"{name}.py"), ast.parse(source), source.count("\n"))


def test_the_reader_of_imports_sees_late_and_type_checking_imports() -> None:
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
    known = modules(PACKAGE) | {"nqnb.worker.run": None, "nqnb.store": None}
    found = {imported for _, _, imported in imports_of(parsed(source, "nqnb.worker.worker"), known)}
    assert found == {
        "__future__",
        "nats.errors",
        "nqnb.protocol.names",
        "nqnb.protocol.wire",
        "nqnb",
        "typing",
        "nqnb.client",
        "pandas",
        "nqnb.jetstream.backend",
        "nqnb.worker.run",
        "nqnb.store",
    }


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package with one circle, one repeated file and class name, and private accesses of each kind."""
    package = tmp_path / "nqnb"
    for path, source in {
        "__init__.py": "",
        "first.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nqnb.second import Second\n",
        "second.py": "class Second:\n    def late(self):\n        from nqnb.inner import third\n",
        "inner/__init__.py": "",
        "inner/third.py": "from nqnb import first\nclass Second: ...\n",
        "inner/second.py": """
import os
from nqnb.first import _hidden
class Twin:
    def __init__(self, twin):
        self._own = twin._own
        self._friend = twin.friend._secret
        os._exit(0)
    def move(self):
        return super()._move, self._moved
""",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(source)
    return package


def test_a_circle_closed_by_type_checking_and_late_imports_is_found(small_package: Path) -> None:
    assert circles(small_package) == [["nqnb.first", "nqnb.inner.third", "nqnb.second"]]


def test_repeated_names_are_found(small_package: Path) -> None:
    assert repeated_files(small_package) == {"second.py": ["inner/second.py", "second.py"]}
    assert repeated_classes(small_package) == {"Second": ["nqnb.inner.third", "nqnb.second"]}


def test_private_accesses_from_outside_are_found_and_those_from_inside_are_not(small_package: Path) -> None:
    assert [text for _, _, text in private_accesses(small_package)] == ["nqnb.first._hidden", "twin.friend._secret"]
