"""Prints which operations the explorer runs, with the states that it reaches, and which broken variants it catches.

Run it with ``python -m tests.model.report``; it takes about two minutes. ``--full`` adds the large scenarios and
the slow variants.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

from . import life_scenarios
from .room_scenarios import BOUNDS, LARGE_SCENARIOS, OPERATIONS, SCENARIOS, SLOW_VARIANTS, VARIANTS, summary_of


def report(*, full: bool = False) -> None:
    """Print what the real coroutines were explored in."""
    scenarios = {**SCENARIOS, **(LARGE_SCENARIOS if full else {})}
    found = {name: summary_of(scenario) for name, scenario in scenarios.items()}
    print("The coroutines of nqnb.protocol, over every order of their requests, within these bounds:")
    print(BOUNDS)
    print(f"\n{'operation':<10} {'scenarios':>9} {'states':>10}")
    for operation, takes_part in OPERATIONS.items():
        names = [name for name in scenarios if takes_part(name, found[name].steps)]
        print(f"{operation:<10} {len(names):>9} {sum(found[name].states for name in names):>10,}")
    print(f"\n{'scenario':<60} {'states':>8} {'positions':>9}  rules")
    for name, summary in found.items():
        print(f"{name:<60} {summary.states:>8,} {summary.positions:>9,}  {summary.rule or 'all hold'}")
    print(f"\n{'broken variant':<75} {'steps':>5}  rule that it breaks")
    for name, variant in VARIANTS.items():
        if name in SLOW_VARIANTS and not full:
            continue
        summary = summary_of(variant.broken)
        print(f"{name:<75} {len(summary.trace):>5}  {summary.rule or 'NONE'}")


def report_life() -> None:
    """Print what the model of a worker's life was explored in; its decisions are those of `nqnb.protocol.lifecycle`."""
    print("\nA worker's life, with broken links, reconnects and adopted redeliveries:")
    print(f"\n{'world':<60} {'states':>8}  rules")
    for name, world in life_scenarios.WORLDS.items():
        found = world.model.explore()
        print(f"{name:<60} {len(found.states):>8,}  {found.broken or 'all hold'}")
    print(f"\n{'broken variant':<75} {'steps':>5}  rule that it breaks")
    for broken, (model, _) in life_scenarios.BREAKS.items():
        found = replace(model, broken=broken).explore()
        print(f"{broken.value:<75} {len(found.trace):>5}  {found.broken or 'NONE'}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    report(full="--full" in sys.argv[1:])
    report_life()
