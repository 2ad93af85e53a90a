"""Groups of failed tasks: patterns of messages, lines of tracebacks, and ids that stay the same."""

from __future__ import annotations

import time

import msgspec
import pytest

from nqnb.failures import failure_id, group_failures, handler_line, message_pattern
from nqnb.protocol.wire import ErrorInfo, Meta, Status, TaskMessage
from nqnb.records import TaskInfo

TRACE = """Traceback (most recent call last):
  File "/srv/app/open.py", line 3, in read
    return data[key]
KeyError: 'width'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/srv/app/jobs/resize.py", line 12, in resize
    requests.get(url)
  File "/venv/lib/python3.11/site-packages/requests/api.py", line 73, in get
    return request("get", url)
  File "/usr/lib/python3.11/socket.py", line 851, in create_connection
    raise OSError
OSError: refused
"""


def failed(
    id: str, message: str, *, queue: str = "resize", error_type: str = "ValueError", trace: str = ""
) -> TaskInfo:
    error = ErrorInfo(error_type, message, trace)
    return TaskInfo.of(TaskMessage(ID=id, Queue=queue, Status=Status.FAILED, Meta=Meta(error=error)), 1)


@pytest.mark.parametrize(
    ("message", "pattern"),
    [
        ("'width'", "<text>"),
        ("payload 17 is bad: 'a b.png' in /data/x/y.txt", "payload <number> is bad: <text> in <path>"),
        ("images/a/17.png is broken", "<path> is broken"),
        (r"C:\images\a.png: denied", "<path>: denied"),
        ("HTTP 503 from https://example.org/a?b=1", "HTTP <number> from <url>"),
        ("took 1.5 s for 3,000 rows, -7e-3 left", "took <number> s for <number> rows, <number> left"),
        ("img_0017 has 10ms", "img_<number> has <number>ms"),
        ("task koZR05HfA95uAHpxVsru4Z is lost at 0x7fff2", "task <id> is lost at <id>"),
        ("row 550e8400-e29b-41d4-a716-446655440000", "row <id>"),
        ("can't say why it won't", "can't say why it won't"),
        ("cannot convert int32, either/or", "cannot convert int32, either/or"),
        ("two\n  lines\x1b[K", r"two lines\x1b[K"),
        ("", ""),
    ],
)
def test_a_pattern_has_placeholders_for_what_differs(message: str, pattern: str) -> None:
    assert message_pattern(message) == pattern


def test_the_line_of_a_handler_is_the_innermost_one_outside_of_libraries() -> None:
    assert handler_line(TRACE) == "resize.py:12 in resize"
    in_a_cell = TRACE.replace('File "/srv/app/jobs/resize.py"', "Cell In[4]")
    assert handler_line(in_a_cell) == "Cell In[4], line 12 in resize"
    assert handler_line(TRACE[-200:]) == "socket.py:851 in create_connection", "only libraries are left"
    assert handler_line("") == handler_line("ValueError: no, line 5") == ""


def test_tasks_that_failed_for_the_same_reason_are_one_group() -> None:
    tasks = [
        *(failed(f"{number}", f"no file 'img{number}.png'", trace=TRACE) for number in range(5)),
        failed("other-line", "no file 'a'", trace=TRACE.replace("line 12", "line 20")),
        failed("other-type", "no file 'a'", error_type="OSError", trace=TRACE),
        failed("other-queue", "no file 'a'", queue="shrink", trace=TRACE),
        TaskInfo.of(TaskMessage(ID="go", Queue="resize", Status=Status.FAILED), 1),
        TaskInfo.of(TaskMessage(ID="well", Queue="resize", Status=Status.COMPLETED), 1),
    ]
    groups = group_failures(tasks)
    assert [each.count for each in groups] == [5, 1, 1, 1, 1]
    first = groups[0]
    assert (first.error, first.where) == ("ValueError: no file <text>", "resize.py:12 in resize")
    assert (first.ids, first.example, first.traceback) == ([*"01234"], "4", TRACE)
    assert next(each for each in groups if each.ids == ["go"]).error == "no reason was recorded"
    assert len({each.id for each in groups}) == len(groups)
    assert [failure_id(task) for task in tasks[:5]] == [first.id] * 5
    assert failure_id(tasks[-1]) == ""
    # Other failures do not change the id.
    assert group_failures(tasks[3:4])[0].id == first.id
    assert group_failures([]) == []
    assert "5 in resize" in repr(first)


def test_the_number_of_requeued_tasks_is_known() -> None:
    again = msgspec.structs.replace(failed("a", "no"), requeued_as="b")
    assert group_failures([again, failed("c", "no")])[0].requeued == 1


@pytest.mark.parametrize("part", ["'", '"\\', "`", "a/", "a.b", "a-", "1,", "0a", "/", ", line ", " ", "(", "A"])
def test_a_long_text_takes_little_time(part: str) -> None:
    """A pattern that backtracks takes minutes for these texts."""
    begin = time.process_time()
    message_pattern(part * 100_000)
    handler_line(part * 100_000)
    assert time.process_time() - begin < 2
