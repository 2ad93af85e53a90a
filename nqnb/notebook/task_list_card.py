"""The card of a list of tasks: the number of tasks in each state, the rate, the time left, and the groups of failures.

All text is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from html import escape
from typing import Any

from nqnb.failures import group_failures
from nqnb.protocol.wire import Status
from nqnb.records import TaskInfo
from nqnb.text import line, long_duration
from nqnb.widgets.state_bar import bar_html, in_bar_order

RECENT_SECONDS = 60.0
"""The length of the recent period for which the rate is computed."""
_MAX_FAILURES = 3
"""The maximum number of failure groups on the card."""


def html(outcomes: Sequence[Any], queues: Sequence[str], now: float, unserved: str) -> str:
    """Return the card as HTML.

    Args:
        outcomes: the record of each task, or the error for a task that no longer exists.
        queues: the queues of the tasks.
        now: the server's time, in Unix seconds.
        unserved: a phrase that names the queues without workers, or an empty string.
    """
    infos = [each for each in outcomes if isinstance(each, TaskInfo)]
    counts = counted(outcomes)
    states = ", ".join(f"{count:,} {label}" for label, count in counts.items()) or "none"
    said = [states, *rate(infos, now), *([unserved] if unserved else [])]
    total = f"{len(outcomes):,} task{'' if len(outcomes) == 1 else 's'}"
    where = f" in {escape(line(', '.join(queues), 100))}" if queues else ""
    head = f"<div><b>{total}</b>{where}: {escape('; '.join(said))}</div>"
    drawn = bar_html(in_bar_order(counts))
    groups = group_failures(infos)
    failures = [
        f"{group.count:,} failed: {group.error}{f' at {group.where}' if group.where else ''}" for group in groups
    ]
    if len(failures) > _MAX_FAILURES:
        failures[_MAX_FAILURES:] = [f"and {len(failures) - _MAX_FAILURES:,} more failure groups; see tasks.failures()"]
    listed = "".join(f"<li>{escape(line(text, 200))}</li>" for text in failures)
    left = any(not info.status.terminal for info in infos)
    # A saved card does not change any more, although the tasks go on.
    hint = (
        f"as of {datetime.fromtimestamp(now):%Y-%m-%d %H:%M:%S}; <code>tasks.watch()</code> shows a live table; "
        "<code>tasks.cancel()</code> cancels all tasks"
        if left
        else ""
    )
    return f"<div>{head}{drawn}{f'<ul>{listed}</ul>' if listed else ''}{hint}</div>"


def counted(outcomes: Sequence[Any]) -> dict[str, int]:
    """Return the number of tasks in each state. Tasks that no longer exist are counted as ``unknown``."""
    counts = Counter(each.status.label if isinstance(each, TaskInfo) else "unknown" for each in outcomes)
    return {label: counts[label] for label in (*(status.label for status in Status), "unknown") if counts[label]}


def rate(infos: Sequence[TaskInfo], now: float) -> list[str]:
    """Return phrases for the number of tasks that end per second and for the time left; see `rate_words`."""
    left = sum(not info.status.terminal for info in infos)
    ends = [info.completed_at.timestamp() for info in infos if info.completed_at]
    began = min((info.started_at.timestamp() for info in infos if info.started_at), default=now)
    return rate_words(left, sum(end > now - RECENT_SECONDS for end in ends), now - began)


def rate_words(left: int, recent: int, seconds: float) -> list[str]:
    """Return phrases for the number of tasks that end per second and for the time left.

    If all tasks have ended, or no task has ended recently, the list is empty.

    Args:
        left: the number of tasks that have not ended.
        recent: the number of tasks that ended in the last `RECENT_SECONDS` seconds.
        seconds: the time since the first task was started, in seconds.
    """
    if not left or not recent:
        return []
    speed = recent / max(1.0, min(RECENT_SECONDS, seconds))
    each = f"{speed:,.0f} tasks/s" if speed >= 10 else f"{speed:.1f} tasks/s"
    return [each, f"about {long_duration(left / speed)} left"]
