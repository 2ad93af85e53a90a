"""The supervisor starts alone and quickly: as a script, without nqnb, and with nothing beside it that could get in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_a_signal_to_a_group_that_has_just_exited_does_not_hide_the_exit_code() -> None:
    """macOS refuses a signal to a group of zombies; here, a stand-in for `os.killpg` does."""
    code = f"""
import os
import sys
sys.path.insert(0, {str(FILE.parent)!r})
import supervisor

go, start = os.pipe()
end, alive = os.pipe()
runner = os.fork()
if not runner:
    os.read(go, 1)
    os._exit(7)
os.close(alive)

def next_command(wake):
    os.write(start, b"!")
    os.read(end, 1)  # until the runner has exited
    return supervisor.TERMINATE

def killpg(group, number):
    raise PermissionError

supervisor.next_command, os.killpg = next_command, killpg
print(supervisor._wait_for_runner(os.getppid(), runner, -1))
"""
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("7\n", "")
