"""The benchmark of a worker's layers runs, and drains all tasks with each layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "drain_layers.py"


def test_each_layer_drains_all_tasks() -> None:
    command = [sys.executable, str(SCRIPT), "--tasks", "700", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert list(layers) == ["callbacks", "coroutines", "handlers", "requests", "worker"]
    assert all(each["cpu_us"] > 0 and each["per_second"] > 0 for each in layers.values()), layers
