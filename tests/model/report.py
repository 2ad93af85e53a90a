"""Prints which operations the explorer runs, with the states that it reaches, and which broken variants it catches.

Run it with ``python -m tests.model.report``; it takes about a minute. ``--full`` adds the large scenarios.
"""

from __future__ import annotations

import logging
import sys

from .room_scenarios import LARGE_SCENARIOS, OPERATIONS, SCENARIOS, VARIANTS, summary_of


def report(*, full: bool = False) -> None:
    """Print all of it."""
    scenarios = {**SCENARIOS, **(LARGE_SCENARIOS if full else {})}
    found = {name: summary_of(scenario) for name, scenario in scenarios.items()}
    print(f"{'operation':<10} {'scenarios':>9} {'states':>10}")
    for operation, takes_part in OPERATIONS.items():
        names = [name for name in scenarios if takes_part(name, found[name].steps)]
        print(f"{operation:<10} {len(names):>9} {sum(found[name].states for name in names):>10,}")
    print(f"\n{'scenario':<60} {'states':>8} {'positions':>9}  rule")
    for name, summary in found.items():
        print(f"{name:<60} {summary.states:>8,} {summary.positions:>9,}  {summary.rule or 'all hold'}")
    print(f"\n{'broken variant':<75} {'steps':>5}  rule that it breaks")
    for name, variant in VARIANTS.items():
        summary = summary_of(variant.broken)
        print(f"{name:<75} {len(summary.trace):>5}  {summary.rule or 'NONE'}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    report(full="--full" in sys.argv[1:])
