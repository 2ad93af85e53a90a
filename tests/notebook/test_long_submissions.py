"""An interrupted submission of a million payloads: the memory stays bounded, and the reported number is exact."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from helpers.kernels import kernel

import nqnb

MOST_MEGABYTES = 200
SETUP = """
import nqnb
nq = nqnb.session({url!r})
nq.submit("flood", 0)

def megabytes():
    # the highest number so far
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1000

start = megabytes()
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_payloads_are_interrupted(tmp_path: Path) -> None:
    with nqnb.DevServer() as server, kernel(tmp_path) as cells:
        cells.run(SETUP.format(url=server.url))
        waits = cells.start("tasks = nq.submit_many('flood', ({'n': n} for n in range(1_000_000)))")
        time.sleep(5)
        cells.interrupt()
        cell = cells.end(waits)
        found = re.search(r"interrupted: ([\d,]+) tasks were submitted to flood$", cell.stderr, re.MULTILINE)
        assert found, cell
        said = int(found[1].replace(",", ""))
        stored, known, grown = cells.run(
            "print(nq.queues().loc['flood', 'pending'], len(nq.interrupted), megabytes() - start)"
        ).stdout.split()
        assert said > 1000
        assert (int(stored), int(known)) == (said + 1, said)
        assert float(grown) < MOST_MEGABYTES
        print(f"{said:,} tasks, {float(grown):.0f} MB")
