"""A timeline of tasks as SVG: when each task was waiting and running, on which worker it ran, and how it ended.

The SVG is static and contains no scripts. It therefore remains visible in saved notebooks. All text is escaped. The
colours are readable on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from html import escape

from nqnb.protocol.status import Status
from nqnb.records import TaskInfo
from nqnb.text import clock, duration, line, long_duration
from nqnb.widgets.snapshot import DOTS

MOST_TASKS = 200
"""The maximum number of tasks in a timeline. The tasks that started last are shown."""
_WIDTH, _ROW, _LABEL, _TOP, _END = 900, 18, 210, 28, 110
_TICKS = 6
_STYLE = (
    "font:12px var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,inherit);max-width:100%;"
    "min-width:760px;height:auto"
)


class Timeline:
    """A drawing of tasks over time. A notebook shows the drawing as SVG.

    Args:
        tasks: the tasks.
        names: the names of workers, by id.
        now: the time at which the bars of unfinished tasks end. The default is the current time.
    """

    def __init__(
        self, tasks: Iterable[TaskInfo], names: dict[str, str] | None = None, now: datetime | None = None
    ) -> None:
        self._now = now or datetime.now(timezone.utc)
        self._names = names or {}
        self._tasks = sorted(
            (task for task in tasks if task.submitted_at is not None),
            key=lambda task: (task.started_at or task.submitted_at or self._now, task.id),
        )

    def __repr__(self) -> str:
        shown = self._tasks[-MOST_TASKS:]
        if not shown:
            return "no tasks to draw"
        return "\n".join(f"{line(task.id, 22):<22}  {self._words(task)}" for task in shown)

    def _repr_html_(self) -> str:
        if not self._tasks:
            return "<p>no tasks to draw</p>"
        # On a narrow page, the drawing scrolls, because its text would become too small.
        return f'<div style="overflow-x:auto" tabindex="0" role="group" aria-label="timeline">{self.svg()}</div>'

    def svg(self) -> str:
        """Return the drawing as an SVG element."""
        shown = self._tasks[-MOST_TASKS:]
        start = min((task.submitted_at or self._now for task in shown), default=self._now)
        end = max([start + timedelta(milliseconds=1), *(self._end(task) for task in shown)])
        length = (end - start).total_seconds()
        scale = (_WIDTH - _LABEL - _END) / length
        elapsed = duration if length < 60 else long_duration  # `duration` would show 3 m 10 s and 3 m 20 s as "3m"

        def x(at: datetime) -> float:
            return round(_LABEL + (min(max(at, start), end) - start).total_seconds() * scale, 1)

        height = _TOP + _ROW * len(shown) + 24
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img" '
            f'aria-label="timeline of {len(shown):,} tasks" style="{_STYLE}" fill="currentColor">'
        ]
        for tick in range(_TICKS):
            at = start + (end - start) * tick / (_TICKS - 1)
            parts.append(
                f'<line x1="{x(at)}" x2="{x(at)}" y1="{_TOP - 6}" y2="{height - 20}" stroke="#808080" '
                f'stroke-opacity=".3"/>'
                f'<text x="{x(at)}" y="{_TOP - 12}" text-anchor="middle" opacity=".75">'
                f"{f'+{elapsed((at - start).total_seconds())}' if tick else '0'}</text>"
            )
        for place, task in enumerate(shown):
            parts.append(self._row(task, _TOP + _ROW * place, x))
        left = len(self._tasks) - len(shown)
        more = f"; {left:,} earlier task{'s are' if left > 1 else ' is'} left out" if left else ""
        parts.append(
            f'<text x="0" y="{height - 4}" opacity=".75">from {clock(start)} to {clock(end)}{more}</text></svg>'
        )
        return "".join(parts)

    def _row(self, task: TaskInfo, y: int, x: Callable[[datetime], float]) -> str:
        submitted = task.submitted_at or self._now
        started = task.started_at if task.attempt else None
        middle = y + _ROW // 2
        parts = [
            f"<title>{escape(line(f'{task.id}: {self._words(task)}', 300))}</title>",
            f'<text x="0" y="{middle + 4}">{escape(line(task.id, 12))} '
            f'<tspan opacity=".75">{escape(line(self._worker(task), 18))}</tspan></text>',
            f'<line x1="{x(submitted)}" x2="{x(started or self._end(task))}" y1="{middle}" y2="{middle}" '
            f'stroke="{DOTS["pending"]}" stroke-width="2" stroke-dasharray="3 3"/>',
        ]
        if started is not None:
            left, right = x(started), x(self._end(task))
            parts.append(
                f'<rect x="{left}" y="{y + 3}" width="{max(2.0, round(right - left, 1))}" height="{_ROW - 6}" rx="2" '
                f'fill="{DOTS[task.status.label]}"/>'
            )
        marks = []
        if task.attempt > 1:
            marks.append(f"retry {task.attempt - 1}")
        if task.cancel is not None and task.cancel.requested_at is not None:
            at = x(task.cancel.requested_at)
            parts.append(
                f'<path d="M{at - 4} {middle - 5}l8 10m0 -10l-8 10" stroke="currentColor" stroke-width="2" '
                'fill="none"/>'
            )
            marks.append("cancel")
        elif task.status is Status.FAILED:
            marks.append("failed")
        if marks:
            parts.append(f'<text x="{x(self._end(task)) + 6}" y="{middle + 4}" opacity=".85">{", ".join(marks)}</text>')
        return f"<g>{''.join(parts)}</g>"

    def _end(self, task: TaskInfo) -> datetime:
        return task.completed_at or self._now

    def _worker(self, task: TaskInfo) -> str:
        return self._names.get(task.worker, task.worker)

    def _words(self, task: TaskInfo) -> str:
        parts = [task.status.label, f"attempt {task.attempt}" if task.attempt > 1 else ""]
        if task.started_at is not None and task.submitted_at is not None and task.attempt:
            parts.append(f"waited {duration((task.started_at - task.submitted_at).total_seconds())}")
            parts.append(f"ran {duration((self._end(task) - task.started_at).total_seconds())}")
        parts += [f"on {self._worker(task)}" if task.worker else "", task.failure]
        return line(", ".join(filter(None, parts)), 200)
