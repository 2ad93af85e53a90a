"""How an attack looks: a live board while it runs, then what its cancels met, its figures and its breaches."""

from __future__ import annotations

from collections import Counter

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from nqnb.cli.tables import Column, Sheet, bar, fields, stack
from nqnb.testing.chaos import ChaosReport, ChaosState
from nqnb.testing.chaos.figures import Spread
from nqnb.testing.chaos.plan import Moment
from nqnb.text import clean, duration, line

_ENDS = ("deleted", "cancelled", "completed", "failed", "unknown", "no answer")


class ChaosBoard:
    """An attack while it runs."""

    def __init__(self, state: ChaosState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self._state
        ended = sum(state.ended.values())
        yield Text(f"nqnb chaos: {state.phase}, {duration(state.seconds)}", style="bold")
        yield fields(
            [
                ("submitted", Text.assemble(bar(state.submitted, state.tasks, 20), f" of {state.tasks:,}")),
                ("ended", Text.assemble(bar(ended, state.tasks, 20), f" {_counts(state.ended)}")),
                ("cancels", f"{state.cancels:,}"),
                ("not accepted", f"{state.refused:,}" if state.refused else ""),
                ("workers", f"{state.workers}"),
                ("faults", _counts(state.faults)),
            ]
        )
        for at, what, over in state.last_faults[-max(0, console.size.height - 9) :]:
            text = line(f"{at:7.1f} s  {what}")
            yield Text(text, style="dim" if over else "red", no_wrap=True, overflow="ellipsis")


def chaos_report(record: ChaosReport) -> RenderableType:
    """How an attack ended."""
    made = record.figures
    columns = [
        Column("a cancel met the task"),
        Column("cancels", right=True, dispensable=1),
        *(Column(end, right=True) for end in _ENDS[:-1]),
        Column(_ENDS[-1], right=True, dispensable=2),
    ]
    rows = []
    for moment in Moment:
        counts = made.cancels.get(moment, Counter())
        rows.append([moment.value, *(f"{count:,}" for count in (counts.total(), *(counts[end] for end in _ENDS)))])
    if not any(counts[_ENDS[-1]] for counts in made.cancels.values()):
        for row in rows:
            row[-1] = ""
    verdict = (
        Text("Every rule held.", "bold green")
        if record.ok
        else Text(f"{len(record.breaches)} breaches, with seed {record.seed}:", "bold red")
    )
    parts: list[RenderableType] = [
        Sheet(columns, rows),
        Text(),
        fields(
            [
                ("seed", f"{record.seed}"),
                ("server", record.where),
                ("tasks", f"{record.submitted:,} submitted, {record.acknowledged:,} acknowledged"),
                ("ended", _counts(made.ends)),
                ("runs", f"{made.runs:,}, of which {made.again:,} followed one that a fault had ended"),
                ("revisions", f"{record.revisions:,} judged"),
                ("faults", _counts(made.faults) or "none"),
                ("submit to ack", _spread(made.ack)),
                ("submit to start", _spread(made.start)),
                ("cancel to stop", _spread(made.stop)),
                ("longest stall", f"{made.stall:.2f} s without an acknowledgement"),
                ("time", f"{record.seconds:.0f} s"),
            ]
        ),
        Text(),
        verdict,
    ]
    for rule, count in Counter(each.rule for each in record.breaches).items():
        parts.append(Text(f"  {count:,} x {rule.value}", "red"))
    for told in record.told:
        task = f"task {told.breach.task} " if told.breach.task else ""
        parts += [Text(), Text(clean(f"{task}{told.breach.rule.value}: {told.breach.text}"), "bold red")]
        parts += [Text(clean(each)) for each in told.timeline]
    return stack(*parts)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count)


def _spread(spread: Spread) -> str:
    if not spread.count:
        return ""
    p50, p99, most = (f"{1000 * value:,.0f} ms" for value in (spread.p50, spread.p99, spread.most))
    return f"p50 {p50}, p99 {p99}, longest {most}"
