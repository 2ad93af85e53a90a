"""The benchmark of the operations on many tasks runs, and each operation handles all tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bulk.py"


def test_each_operation_handles_all_tasks() -> None:
    command = [sys.executable, str(SCRIPT), "--tasks", "300", "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["tasks"]["300"]
    assert set(found) == {"watch_all", "tasks", "tasks_and_frame", "watch", "submit_many", "cancel", "prune", "purge"}
    assert all(each["seconds"] > 0 and each["ratio"] > 0 for each in found.values()), found
