"""The benchmark of a large table runs, and the table shows all tasks and all changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "table.py"


@pytest.mark.full
def test_the_benchmark_measures_each_operation() -> None:
    options = ["--tasks", "300", "--rounds", "1", "--changes", "100", "--seconds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rounds"][0]
    assert {"watch_all", "first_page", "counted", "sort", "search", "filter", "page_turn", "push_to_page_p95"} <= set(
        found
    )
    assert all(each > 0 for name, each in found.items() if not name.startswith("megabytes")), found
