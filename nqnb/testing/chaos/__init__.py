"""An attack on nqnb: tasks and cancels at every moment of their lives, amid faults, judged by what was written down.

``nqnb chaos`` runs it from the command line. `run_chaos` starts servers and worker processes of its own, or uses a
given server. It submits tasks, cancels them, and injects faults: workers are killed and suspended, the server is
killed, links are cut, event loops are blocked, the store is filled, clocks are wrong, a cluster loses its leaders.
Then it judges, from the handlers' own log and from every stored revision, whether each rule held.
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
"""Where each public name lives. They load when first touched, so that other commands need not wait for them."""


def __getattr__(name: str) -> Any:
    for file, residents in _FILES.items():
        if name in residents.split():
            value = getattr(import_module(f"nqnb.testing.chaos.{file}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'nqnb.testing.chaos' has no attribute {name!r}")
