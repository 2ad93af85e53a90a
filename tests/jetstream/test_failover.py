"""A submit waits about as long as the cluster has no leader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "failover.py"


@pytest.mark.full
@pytest.mark.timeout(260)
@pytest.mark.parametrize("kill", ["task", "state"])
def test_a_submit_waits_little_longer_than_a_raw_publish_when_the_leader_dies(kill: str) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "3", "--kill", kill]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == []
    # Elections and other programs can delay single rounds, but a submit that waits longer does so in all of them.
    assert min(each["more"] for each in found["rounds"]) <= 1.5, found
