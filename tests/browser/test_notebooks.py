"""The notebooks run in a clean kernel, and their saved outputs are readable without one."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser.labs import Lab
from browser.sheets import App, Sheet

import nqnb

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
TASK_ID = r"\b(?:[0-9A-Za-z]{22}|[a-z]+-\d+)\b"
"""An id of nqnb, or one of the notebook about Go."""

SLOW_CALL = re.compile(r"waited |[\d,]+ of [\d,]+ tasks \w+$")


def kinds(notebook: Any) -> list[list[str]]:
    """Return the types of the outputs of each cell, without the outputs that only a slow machine shows."""
    return [
        [each.output_type for each in cell.get("outputs", []) if not is_of_a_slow_call(each)] for cell in notebook.cells
    ]


def is_of_a_slow_call(output: Any) -> bool:
    """Return whether an output is a line that a call leaves only if it takes long: that it waited, or its progress."""
    return SLOW_CALL.match(str(output.get("data", {}).get("text/plain", ""))) is not None


def complaints(notebook: Any) -> list[str]:
    """Return what the cells wrote to stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text for output in outputs if output.get("name") == "stderr"]


def views(notebook: Any) -> list[str]:
    """Return the outputs that only a live kernel could show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [name for output in outputs for name in output.get("data", {}) if "widget" in name]


def test_all_notebooks_are_found() -> None:
    assert NAMES == [
        "01-first-minute.ipynb",
        "02-cancel-anything.ipynb",
        "03-a-parameter-sweep.ipynb",
        "04-live-operations.ipynb",
        "05-beside-go.ipynb",
        "06-to-production.ipynb",
    ]


def test_the_notebooks_quote_the_files_of_the_repository() -> None:
    root = FOLDER.parent
    assert (FOLDER / "go_nq.jsonl").read_bytes() == (root / "tests" / "protocol" / "go_nq.jsonl").read_bytes()
    for name, file in (("04", "monitoring/alerts.yml"), ("06", "deploy/nqnb-worker@.service")):
        (path,) = FOLDER.glob(f"{name}-*.ipynb")
        cells = nbformat.read(path, as_version=4).cells
        (quoted,) = re.findall(r"```(?:yaml|ini)\n(.*?)```", "".join(cell.source for cell in cells), re.DOTALL)
        assert set(quoted.splitlines()) <= set((root / file).read_text(encoding="utf-8").splitlines())


@pytest.fixture
def packages(path: Path) -> None:
    """Skip a notebook where a package that it imports is missing; fail in CI."""
    text = path.read_text(encoding="utf-8")
    missing = [name for name in ("matplotlib", "prometheus_client", "trustme") if name in text and not find_spec(name)]
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{path.name} needs {', '.join(missing)}")


@pytest.mark.parametrize(
    "path", [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.full) for path in NOTEBOOKS[1:])], ids=NAMES
)
@pytest.mark.usefixtures("packages")
@pytest.mark.filterwarnings("ignore:Kernel is running over TCP")  # on loopback, as Jupyter does
def test_a_notebook_runs_in_a_clean_kernel(path: Path, server: nqnb.DevServer) -> None:
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    made = execute(path, server.url)
    saved = nbformat.read(path, as_version=4)
    assert complaints(made) == []
    assert kinds(made) == kinds(saved), "the saved outputs are outdated: run `python notebooks/execute.py`"
    assert views(made) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_saved_outputs_need_no_kernel(path: Path) -> None:
    nbconvert = pytest.importorskip("nbconvert", reason="nbconvert is not installed")
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    assert "widgets" not in saved.metadata
    assert views(saved) == []
    assert not any(output.output_type == "error" for cell in saved.cells for output in cell.get("outputs", []))
    assert all(cell.execution_count for cell in saved.cells if cell.cell_type == "code")
    body, _ = nbconvert.HTMLExporter().from_notebook_node(saved)
    cell = next(cell for cell in saved.cells if cell.cell_type == "code" and "nq.watch(" in cell.source)
    table = cell.outputs[0].data["text/html"]
    assert "completed" in table or "cancelled" in table
    assert "<table" in table
    ids = set(re.findall(TASK_ID, table))
    assert len(ids) >= 5
    assert ids <= set(re.findall(TASK_ID, body)), "the frozen table is in the page"
    for folder in (Path.home(), tempfile.gettempdir(), sys.prefix):
        assert f"{folder}/" not in body


@pytest.mark.full
@pytest.mark.parametrize("app", ["lab", "notebook"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
@pytest.mark.usefixtures("packages")
def test_run_all_in_the_browser(
    app: App, path: Path, sheet: Callable[..., Sheet], lab: Lab, server: nqnb.DevServer,
    shot: Callable[[Any, str], Path],
) -> None:  # fmt: skip
    name = f"{app}-{path.name}"
    notebook = nbformat.read(path, as_version=4)
    shutil.copy(FOLDER / "go_nq.jsonl", lab.root)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%env NATS_URL={server.url}"))
    nbformat.write(notebook, lab.root / name)
    page = sheet(app, name=name, height=6000)
    page.run_all(timeout=90_000)
    cells = [i for i in range(len(notebook.cells)) if notebook.cells[i].cell_type == "code"]
    assert not [page.text(i) for i in cells if page.failed(i)]
    watch = next(i for i in cells if "nq.watch(" in notebook.cells[i].source)
    # The table is frozen, unless failed tasks can be requeued in it.
    view = page.output(watch).locator(".nq:not(:has([data-act=ask-requeue]:not([hidden])))")
    view.wait_for(state="detached", timeout=20_000)
    # On a busy machine, the page may not have shown the table yet.
    snapshot = page.output(watch).locator("table:not([role=grid])")
    page.until(lambda: snapshot.count() == 1, "the snapshot", timeout=60)
    shot(page.page, f"run-all-{app}-{path.stem}")
