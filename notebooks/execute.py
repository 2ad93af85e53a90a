"""Executes the notebooks from a clean kernel, on a nats-server of their own, and saves them with their outputs.

    python notebooks/execute.py             # all of them
    python notebooks/execute.py 01*.ipynb   # one

The saved outputs are plain HTML and text: no state of widgets, which the next kernel would not know.
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
TAKES = 60
"""Seconds that a cell may take."""
OWN = ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


def execute(path: Path, url: str) -> Any:
    """Run a notebook from a clean kernel of a fresh user.

    Args:
        path: the notebook.
        url: the nats-server that it is to use.

    Returns:
        The notebook with its new outputs; nothing is saved.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
    with tempfile.TemporaryDirectory(prefix="nqnb-notebooks-") as home:
        client = NotebookClient(
            notebook,
            timeout=TAKES,
            kernel_name="python3",
            store_widget_state=False,
            coalesce_streams=True,  # a kernel may send one print in two parts
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env={**kept, **dict.fromkeys(OWN, home), "NATS_URL": url})
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook


def main() -> None:
    """Execute and save what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="*", type=Path, help="default: all beside this file")
    parser.add_argument(
        "--port", type=int, default=0, help="of the nats-server, which the outputs show; default: a free one"
    )
    given = parser.parse_args()
    for path in given.notebook or sorted(HERE.glob("*.ipynb")):
        with nqnb.DevServer(port=given.port) as server:
            notebook = execute(path, server.url)
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path}: {len(notebook.cells)} cells\n")


if __name__ == "__main__":
    main()
