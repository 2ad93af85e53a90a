"""The notebooks run in a clean kernel, and their saved outputs are readable without one."""

from __future__ import annotations

import os
import re
import runpy
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


def kinds(notebook: Any) -> list[list[str]]:
    """Return the types of the outputs of each cell, without the lines of waits, which only a slow machine shows."""
    return [[each.output_type for each in cell.get("outputs", []) if not is_wait_line(each)] for cell in notebook.cells]


def is_wait_line(output: Any) -> bool:
    """Return whether an output is the line that a call leaves if it waited for more than a second."""
    return str(output.get("data", {}).get("text/plain", "")).startswith("waited ")


def complaints(notebook: Any) -> list[str]:
    """Return what the cells wrote to stderr."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text for output in outputs if output.get("name") == "stderr"]


def views(notebook: Any) -> list[str]:
    """Return the outputs that only a live kernel could show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [name for output in outputs for name in output.get("data", {}) if "widget" in name]


def test_all_notebooks_are_found() -> None:
    assert NAMES == ["01-first-minute.ipynb", "02-cancel-anything.ipynb", "03-a-parameter-sweep.ipynb"]


@pytest.fixture
def plots(path: Path) -> None:
    """Skip a notebook with plots where matplotlib is missing; fail in CI."""
    if "matplotlib" in path.read_text(encoding="utf-8") and find_spec("matplotlib") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{path.name} needs matplotlib")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
@pytest.mark.usefixtures("plots")
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
    ids = set(re.findall(r"\b[0-9A-Za-z]{22}\b", table))
    assert len(ids) >= 5
    assert ids <= set(re.findall(r"\b[0-9A-Za-z]{22}\b", body)), "the frozen table is in the page"
    assert str(Path.home()) not in body


@pytest.mark.parametrize("app", ["lab", pytest.param("notebook", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "path",
    [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.full) for path in NOTEBOOKS[1:])],
    ids=NAMES,
)
@pytest.mark.usefixtures("plots")
def test_run_all_in_the_browser(
    app: App, path: Path, sheet: Callable[..., Sheet], lab: Lab, server: nqnb.DevServer,
    shot: Callable[[Any, str], Path],
) -> None:  # fmt: skip
    name = f"{app}-{path.name}"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%env NATS_URL={server.url}"))
    nbformat.write(notebook, lab.root / name)
    page = sheet(app, name=name, height=6000)
    page.run_all(timeout=90_000)
    cells = [i for i in range(len(notebook.cells)) if notebook.cells[i].cell_type == "code"]
    assert not [page.text(i) for i in cells if page.failed(i)]
    watch = next(i for i in cells if "nq.watch(" in notebook.cells[i].source)
    page.output(watch).locator(".nq").wait_for(state="detached", timeout=20_000)
    assert page.output(watch).locator("table").count() == 1, "it is frozen"
    shot(page.page, f"run-all-{app}-{path.stem}")
