"""Each example runs as a program, on a real nats-server of its own, and prints what it announces."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTS = {
    "batch_to_pandas.py": [
        r"broken +failed +3 .*TimeoutError: no answer from sensor broken",
        r"slow +completed +2 +6\.0 +<NA>",
        r"mean: 7\.0",
    ],
    "cancel_running_code.py": [
        r"running task: cancelled \| code still runs: False \| how: \w+",
        r"stopped after \d+\.\d\d s by worker w-\w+, requested by \S+",
        r"waiting task: deleted",
        r"result: .*cancelled",
    ],
    "submit_and_wait.py": [
        r"\w+ is completed",
        re.escape("result: [0, 1, 4, 9, 16]"),
        re.escape("results: [[], [0], [0, 1]]"),
    ],
    "watch_a_queue.py": [r"processing=\d", r"(?m)^completed=4$"],
    "worker.py": [r"coroutine: done", r"thread: 10", r"process: 168", r"refused: .*\$\.seconds"],
}
"""By program: what its output must match."""


def test_every_example_is_run() -> None:
    assert sorted(PRINTS) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in index for name in PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs_and_prints_what_it_shows(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    for pattern in PRINTS[name]:
        assert re.search(pattern, done.stdout), (pattern, done.stdout)
