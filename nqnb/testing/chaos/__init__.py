"""Chaos tests: attack nqnb with tasks, cancel calls and faults, and check that nqnb breaks no rule.

``nqnb chaos`` runs an attack from the command line. `run_chaos` starts servers, or uses a server that you pass,
and starts worker processes. It submits tasks, cancels them at various points in their lives, and injects faults:
workers are killed and suspended, the server is killed, links are cut, event loops are blocked, the store is filled,
clocks are shifted, and a cluster loses its leaders. Finally, it checks the diaries (the logs in which the handlers
record their runs) and all stored revisions of the tasks' entries against the rules.

| file | contents |
|---|---|
| `plan` | the options, and the planned tasks and cancel calls |
| `attack` | the phases of an attack |
| `testbed` | the servers, links and worker processes |
| `workload` | the clients that submit and cancel tasks |
| `faults` | the fault injector |
| `chaos_worker` | the program of a worker process |
| `evidence` | all call results, diaries and stored revisions |
| `judge` | the rules |
| `report` | the progress, figures and timelines |
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
"""The public names defined in each file. Files are imported on first use, which makes other commands start faster."""


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names.split():
            value = getattr(import_module(f"nqnb.testing.chaos.{file}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'nqnb.testing.chaos' has no attribute {name!r}")
