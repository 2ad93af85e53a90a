"""Every public name has an example in its docstring, and the examples run as they are written."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import docstring_examples
from test_public_face import MODULES

PATHS = [
    *(f"{module}.{name}" for name, module in MODULES.items()),
    "nqnb.notebook.session.Session",
    "nqnb.notebook.tasks.SessionTask",
    "nqnb.notebook.tasks.TaskList",
    "nqnb.tracing.instrument",
    "nqnb.tracing.uninstrument",
    "nqnb.widgets.table.TaskTable",
    "nqnb.worker.typed_task.TaskFunction",
    "nqnb.worker.typed_task.TypedTask",
]
"""The public names, and what they return."""


@pytest.mark.parametrize("path", PATHS)
def test_every_public_name_has_an_example(path: str) -> None:
    assert docstring_examples.examples(path)


def test_the_examples_run_as_they_are_written() -> None:
    # In a process of its own: `nest` changes asyncio, and the examples of the extension start a shell.
    command = [sys.executable, docstring_examples.__file__, *PATHS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
