"""The public names: sorted, complete, documented, and loaded only when they are first used.

That a strict type checker sees them is shown by mypy, which checks these tests.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nqnb

STUB = ast.parse(Path(nqnb.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
NAMES = [name for name in nqnb.__all__ if name != "__version__"]


def imports_of_the_stub() -> list[tuple[str, str, str | None]]:
    """Return (module, name, alias) of each import that type checkers see."""
    return [
        (str(node.module), alias.name, alias.asname)
        for node in STUB.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


MODULES = {name: module for module, name, _ in imports_of_the_stub()}


def loaded_by(program: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after a program."""
    program += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    return set(done.stdout.split())


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public members that nqnb itself gives a class, or one that it is made of."""
    ours = [base for base in reversed(kind.__mro__) if base.__module__.partition(".")[0] == "nqnb"]
    for name, member in [pair for base in ours for pair in vars(base).items()]:
        if name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function):
            yield name, function


class TestNames:
    def test_are_sorted_and_there_once(self) -> None:
        assert nqnb.__all__ == sorted(set(nqnb.__all__))

    @pytest.mark.parametrize("name", nqnb.__all__)
    def test_can_be_imported(self, name: str) -> None:
        assert getattr(nqnb, name) is not None

    def test_are_what_a_star_imports(self) -> None:
        namespace: dict[str, object] = {}
        exec("from nqnb import *", namespace)  # noqa: S102  that is what is tested
        assert set(namespace) - {"__builtins__"} == set(nqnb.__all__)

    def test_are_in_dir(self) -> None:
        hooks = {"load_ipython_extension", "unload_ipython_extension"}
        assert {name for name in dir(nqnb) if not name.startswith("__")} == {*NAMES} - hooks
        assert dir(nqnb) == sorted(dir(nqnb))

    def test_others_raise_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="module 'nqnb' has no attribute 'Clint'"):
            getattr(nqnb, "Clint")  # noqa: B009  a type checker knows that it is missing
        assert not hasattr(nqnb, "Raw")
        assert not hasattr(nqnb, "")

    def test_the_stub_holds_nothing_but_one_explicit_export_a_name(self) -> None:
        *exports, declared = STUB.body
        assert ast.unparse(declared) == "__all__: list[str]"
        assert all(isinstance(node, ast.ImportFrom) for node in exports)
        assert all(alias == name for _, name, alias in imports_of_the_stub())
        assert len(MODULES) == len(imports_of_the_stub())

    @pytest.mark.parametrize("name", NAMES)
    def test_are_defined_in_the_module_that_the_stub_names(self, name: str) -> None:
        assert getattr(nqnb, name).__module__ == MODULES[name]


class TestDocstrings:
    def test_the_package_has_one(self) -> None:
        assert nqnb.__doc__

    @pytest.mark.parametrize("name", NAMES)
    def test_every_public_name_has_one(self, name: str) -> None:
        thing = getattr(nqnb, name)
        assert (vars(thing) if inspect.isclass(thing) else {"__doc__": thing.__doc__}).get("__doc__")
        # A dataclass without one gets its signature instead.
        assert not thing.__doc__.startswith(f"{name}(")

    @pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(nqnb, name))])
    def test_every_public_method_has_one(self, name: str) -> None:
        assert [method for method, function in members(getattr(nqnb, name)) if not function.__doc__] == []

    def test_help_of_the_client_has_all_its_calls(self) -> None:
        text = pydoc.plain(pydoc.render_doc(nqnb.Client))
        assert {"open", "backend", "submit", "cancel", "purge_queue", "workers"} <= {n for n, _ in members(nqnb.Client)}
        for name, function in members(nqnb.Client):
            assert f" {name}(" in text or f" {name}\n" in text
            assert function.__doc__.strip().splitlines()[0] in text


class TestLoading:
    def test_importing_it_loads_next_to_nothing(self) -> None:
        heavy = {"nats", "pandas", "numpy", "IPython", "ipywidgets", "anywidget", "asyncio", "msgspec", "anyio"}
        assert not heavy & loaded_by("import nqnb; nqnb.__version__; dir(nqnb)")

    def test_touching_client_and_worker_loads_no_connection_and_no_notebook(self) -> None:
        program = "import nqnb; nqnb.Client; nqnb.Worker; nqnb.connect(); nqnb.Worker().handler('q')(lambda job: None)"
        loaded = loaded_by(program)
        assert not {"nats", "pandas", "numpy", "IPython", "ipywidgets", "anywidget", "opentelemetry"} & loaded
        assert {"nqnb", "asyncio", "msgspec"} <= loaded

    def test_no_public_name_loads_the_notebook(self) -> None:
        loaded = loaded_by("import nqnb\nfor name in nqnb.__all__: getattr(nqnb, name)")
        assert not {"nats", "pandas", "numpy", "IPython", "ipywidgets", "anywidget"} & loaded


def test_the_version_is_that_of_the_distribution() -> None:
    assert nqnb.__version__ == importlib.metadata.version("nqnb")


def test_types_are_shipped() -> None:
    assert Path(nqnb.__file__).with_name("py.typed").is_file()
