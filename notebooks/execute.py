"""Execute the notebooks in a clean kernel with a nats-server of its own, and save them with their outputs.

    python notebooks/execute.py             # all notebooks
    python notebooks/execute.py 01*.ipynb   # one notebook

The saved outputs are plain HTML and text, without the state of widgets, which no later kernel would know.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import nqnb

HERE = Path(__file__).parent
CELL_SECONDS = 60
"""The longest time for one cell."""
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
USER_FOLDERS = ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


def execute(path: Path, url: str) -> Any:
    """Run a notebook in a clean kernel, as a new user.

    Args:
        path: the notebook.
        url: the address of the nats-server.

    Returns:
        The notebook with its new outputs; no file is changed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
    with tempfile.TemporaryDirectory(prefix="nqnb-notebooks-") as home:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            store_widget_state=False,
            coalesce_streams=True,  # a kernel may send one print in two messages
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env={**kept, **dict.fromkeys(USER_FOLDERS, home), "NATS_URL": url})
    for output in (each for cell in notebook.cells for each in cell.get("outputs", [])):
        output.get("data", {}).pop(WIDGET_VIEW, None)  # a board remains live until the kernel ends
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook


def main() -> None:
    """Execute and save the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, help="default: all notebooks of this folder")
    parser.add_argument(
        "--port", type=int, default=0, help="port of the nats-server, which the outputs show; default: a free port"
    )
    given = parser.parse_args()
    for path in given.notebook or sorted(HERE.glob("*.ipynb")):
        with nqnb.DevServer(port=given.port) as server:
            notebook = execute(path, server.url)
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path}: {len(notebook.cells)} cells\n")


if __name__ == "__main__":
    main()
