"""The steps of `binder/`, in a new virtual environment: these tests need no Docker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
TREE = Path(__file__).parents[2]
TAKEN = ("nqnb", "notebooks", "binder", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


def test_a_session_opens_on_the_first_notebook_with_a_server(tmp_path: Path) -> None:
    tree, venv, home = tmp_path / "tree", tmp_path / "venv", tmp_path / "home"
    tree.mkdir()
    home.mkdir()
    for name in TAKEN:
        copy = shutil.copytree if (TREE / name).is_dir() else shutil.copy
        copy(TREE / name, tree / name)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "JUPYTER", "XDG_"))}
    environ = {**kept, "HOME": str(home), "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tree, env=environ, check=True, capture_output=True, text=True).stdout

    run("pip", "install", "-q", "-r", "binder/requirements.txt")
    run("binder/postBuild")
    session = subprocess.Popen(
        [tree / "binder" / "start", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
         "--IdentityProvider.token="],
        cwd=tree, env=environ,
    )  # fmt: skip
    try:
        page = urllib.request.urlopen(f"{address(home, session)}/", timeout=20)  # noqa: S310  on loopback
        assert page.geturl().endswith("/lab/tree/notebooks/01-first-minute.ipynb")
        assert json.loads(run("nqnb", "up", "--status", "--json"))["url"].startswith("nats://127.0.0.1:")
        run("jupyter", "execute", "--inplace", "notebooks/01-first-minute.ipynb")
        made = nbformat.read(tree / "notebooks" / "01-first-minute.ipynb", as_version=4)
        said = next(cell.outputs[0].text for cell in made.cells if "%nq up" in cell.source and cell.cell_type == "code")
        assert "detached" in said, "the kernel has found the session's server"
        assert len(json.loads(run("nqnb", "task", "list", "--limit", "500", "--json"))) > 100
    finally:
        session.terminate()
        session.wait(20)
        run("nqnb", "up", "--stop", "--yes")


def address(home: Path, session: subprocess.Popen[bytes]) -> str:
    """Return the address of the Jupyter server, once it has written its runtime file."""
    until = time.monotonic() + 60
    while time.monotonic() < until and session.poll() is None:
        for path in home.glob("**/jpserver-*.json"):
            try:
                return str(json.loads(path.read_text())["url"]).rstrip("/").replace("localhost", "127.0.0.1")
            except ValueError:  # the file is being written
                continue
        time.sleep(0.1)
    raise AssertionError("no Jupyter server came up")
