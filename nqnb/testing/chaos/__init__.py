"""Chaos runs: attack nqnb with tasks, cancels and faults, and check whether every rule holds.

``nqnb chaos`` runs an attack from the command line. `run_chaos` starts its own servers, or uses a server that you pass,
and starts worker processes. It submits tasks, cancels them at every moment of their lives, and injects faults: workers
are killed and suspended, the server is killed, links are cut, event loops are blocked, the store is filled, clocks are
shifted, and a cluster loses its leaders. Then it judges nqnb by the handlers' log and by every stored revision.

| file | contents |
|---|---|
| `plan` | options, tasks and cancels |
| `attack` | the phases of an attack |
| `testbed` | servers, links and worker processes |
| `workload` | the clients that submit and cancel tasks |
| `faults` | the faults |
| `chaos_worker` | the program of a worker process |
| `evidence` | all answers, logs and stored revisions |
| `judge` | the rules |
| `report` | progress, figures and timelines |
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nqnb.testing.chaos.attack import run_chaos
    from nqnb.testing.chaos.judge import Breach, Rule
    from nqnb.testing.chaos.plan import DEFAULT_FAULTS, FAULTS, FOREIGN_FAULTS, ChaosOptions
    from nqnb.testing.chaos.report import ChaosReport, ChaosState

__all__ = [
    "DEFAULT_FAULTS",
    "FAULTS",
    "FOREIGN_FAULTS",
    "Breach",
    "ChaosOptions",
    "ChaosReport",
    "ChaosState",
    "Rule",
    "run_chaos",
]

_FILES = {
    "attack": "run_chaos",
    "judge": "Breach Rule",
    "plan": "DEFAULT_FAULTS FAULTS FOREIGN_FAULTS ChaosOptions",
    "report": "ChaosReport ChaosState",
}
"""The public names of each file. A file is imported on first use, so that other commands start fast."""


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names.split():
            value = getattr(import_module(f"nqnb.testing.chaos.{file}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'nqnb.testing.chaos' has no attribute {name!r}")
