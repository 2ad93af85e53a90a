"""The drawing of tasks over time: escaped, complete, and readable as text."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import datetime, timezone

from nqnb.protocol.wire import CancelRecord, ErrorInfo, Meta, Status, TaskMessage
from nqnb.records import TaskInfo
from nqnb.widgets.timeline import MOST_TASKS, Timeline

NOW = datetime.fromtimestamp(1_000_100, timezone.utc)
START = 1_000_000.0


def info(id: str, status: Status, retry: int = 0, **meta: object) -> TaskInfo:
    known = Meta(**{"submitted_at": START, "worker": "w1", **meta})  # type: ignore[arg-type]  # a dict
    return TaskInfo.of(TaskMessage(ID=id, Queue="q", Status=status, CurrentRetry=retry, Meta=known), 1)


def test_a_timeline_draws_each_task_and_escapes_its_text() -> None:
    tasks = [
        info("<b>one</b>", Status.COMPLETED, started_at=START + 10, finished_at=START + 30),
        info("two", Status.FAILED, 2, started_at=START + 20, finished_at=START + 25, error=ErrorInfo("E", "<i>no</i>")),
        info(
            "three",
            Status.CANCELLED,
            started_at=START + 30,
            finished_at=START + 42,
            cancel=CancelRecord(requested_at=START + 40),
        ),
        info("four", Status.PROCESSING, started_at=START + 50),
        info("five", Status.PENDING),
    ]
    drawn = Timeline(tasks, {"w1": "gpu-3/811"}, NOW)
    svg = drawn._repr_html_()
    frame = ET.fromstring(svg)  # noqa: S314  our own output, which must be well-formed
    assert "overflow-x:auto" in frame.get("style", ""), "a narrow page scrolls the drawing, and keeps its text readable"
    (root,) = frame
    assert "min-width:760px" in root.get("style", "")
    name = "{http://www.w3.org/2000/svg}"
    rows = root.findall(f"{name}g")
    assert len(rows) == 5
    bars = [row.find(f"{name}rect") for row in rows]
    assert [bar is not None for bar in bars] == [False, True, True, True, True], "the pending task has no bar"
    assert all("gpu-3/811" in "".join(row.itertext()) for row in rows)
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "script" not in svg
    said = {"".join(row.itertext()).split(":")[0]: "".join(row.itertext()) for row in rows}
    assert "retry 2, failed" in said["two"]
    assert said["three"].endswith("cancel")
    assert "ran 50s" in said["four"]
    first, second = bars[1], bars[2]
    assert first is not None
    assert second is not None
    assert float(first.get("x", 0)) < float(second.get("x", 0))
    assert "waited 10s, ran 20s" in repr(drawn)


def test_the_labels_of_a_timeline_differ() -> None:
    for seconds in (0.05, 5, 59, 60, 205, 5000, 400_000):
        svg = Timeline([info("one", Status.COMPLETED, started_at=START, finished_at=START + seconds)], {}, NOW).svg()
        labels = re.findall(r">(\+[^<]+)</text>", svg)
        assert len(set(labels)) == 5, labels


def test_a_timeline_shows_the_last_tasks_of_many() -> None:
    many = [
        info(f"t{n}", Status.COMPLETED, started_at=START + n, finished_at=START + n + 1) for n in range(MOST_TASKS + 5)
    ]
    svg = Timeline(many, {}, NOW).svg()
    assert svg.count("<g>") == MOST_TASKS
    assert "5 earlier tasks are left out" in svg
    assert repr(Timeline([])) == "no tasks to draw"
