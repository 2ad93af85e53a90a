"""The supervisor starts alone and quickly: as a script, without nqnb, and with nothing beside it that could get in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from nqnb import supervisor

FILE = Path(supervisor.__file__)


def test_the_supervisor_imports_nothing_of_nqnb() -> None:
    imported = {
        name
        for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "."])
    }
    assert imported
    assert not {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}


def test_no_module_beside_the_supervisor_hides_one_of_the_standard_library() -> None:
    """The folder of a script comes first on its path."""
    beside = {path.stem for path in FILE.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert FILE.stem in beside
    assert not beside & sys.stdlib_module_names


def test_the_supervisor_loads_no_slow_module_at_its_start() -> None:
    code = f"import runpy, sys; runpy.run_path({str(FILE)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    bare = "import runpy, sys; print(*sys.modules)"
    before = subprocess.run([sys.executable, "-I", "-S", "-c", bare], capture_output=True, text=True, check=True).stdout
    slow = {"asyncio", "ctypes", "json", "logging", "shutil", "socket", "subprocess", "threading"}
    assert {"contextlib", "signal"} <= {*loaded.split()}
    assert not slow & ({*loaded.split()} - {*before.split()})
