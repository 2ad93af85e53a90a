"""What a cell shows of an error: the user's code, and none of nqnb's frames."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kernels import Cell, Kernel, kernel

import nqnb

BAD = """
def helper(payload):
    raise ValueError("oh no")

@nq.handler("bad")
def bad(job, payload):
    helper(payload)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel with a session, as `nq`."""
    with nqnb.DevServer() as server, kernel(tmp_path_factory.mktemp("kernel")) as made:
        made.run(f"import nqnb\nurl = {server.url!r}\nnq = nqnb.session(url)\nwaiting = nq.submit('nobody', 1)")
        yield made


def check_frames(cell: Cell, *lines: str) -> None:
    """Check that the marked lines of the displayed frames are these, and that all frames are of cells.

    The lines are without their indent, which IPython 8 does not show.
    """
    shown = cell.traceback
    marked = [line.split("> ")[1].split(" ", 1)[1].strip() for line in shown.splitlines() if "--> " in line]
    assert marked == list(lines), shown
    assert shown.count("Cell In[") == len(lines)
    assert "File " not in shown


@pytest.mark.parametrize(
    "line",
    [
        "waiting.result(timeout=0.05)",
        "waiting.wait(0.05)",
        "nq.submit('a b')",
        "nq.cancel(3)",
        "nq.status('no-such-task')",
        "nq.map('resize', [1, object()])",
        "nq.submit('resize', {'when': object()})",
        "nqnb.session('nats://127.0.0.1:1', connect_timeout=0.2)",
        "await nq.task('no-such-task')",
        "nq.handler('resize', concurrency=0)(print)",
    ],
)
def test_an_error_shows_the_line_of_the_cell_alone(cells: Kernel, line: str) -> None:
    cell = cells.end(cells.start(f"before = 1\n{line}"))
    check_frames(cell, line)
    assert cell.traceback.splitlines()[-1].startswith(cell.error.split(":")[0])


@pytest.mark.parametrize("line", ["waiting.result()", "nq.wait(waiting.id)", "nq.map('nobody', [1]).results()"])
def test_an_interrupt_shows_the_line_of_the_cell_alone(cells: Kernel, line: str) -> None:
    waits = cells.start_waiting(f"before = 1\n{line}")
    cells.interrupt()
    cell = cells.end(waits)
    check_frames(cell, line)
    assert cell.traceback.splitlines()[-1].startswith("KeyboardInterrupt")


def test_the_code_that_nqnb_calls_is_shown(cells: Kernel) -> None:
    cell = cells.end(cells.start("def draw():\n    yield 1\n    1 / 0\nnq.submit_many('bad', draw())"))
    check_frames(cell, "1 / 0", "nq.submit_many('bad', draw())")
    assert "ZeroDivisionError: division by zero" in cell.traceback


def test_the_cell_of_a_handler_shows_its_own_lines(cells: Kernel) -> None:
    cells.run("%load_ext nqnb")
    cell = cells.end(cells.start("%%nq handler resize\nnq.cancel(3)\ndef resize(job): pass"))
    check_frames(cell, "nq.cancel(3)")


def test_an_error_within_a_function_shows_its_callers(cells: Kernel) -> None:
    cell = cells.end(cells.start("def ask():\n    return nq.status('no-such-task')\nask()"))
    check_frames(cell, "ask()", "return nq.status('no-such-task')")


def test_the_error_keeps_its_whole_traceback(cells: Kernel) -> None:
    cells.end(cells.start("nq.cancel(3)"))
    said = cells.run("import sys, traceback; traceback.print_exception(sys.last_value, file=sys.stdout)").stdout
    assert "ids_of(what)" in said


def test_the_traceback_of_a_handler_names_its_cell(cells: Kernel) -> None:
    cells.run(BAD)
    cells.run(
        "task = nq.submit('bad', 1)\ntry: task.result()\nexcept nqnb.TaskFailed as error: trace = error.traceback"
    )
    trace = cells.run("print(trace)").stdout
    assert trace.count("  Cell In[") == 2, trace
    assert "in helper\n" in trace
    assert "ipykernel" not in trace


def test_a_command_that_is_interrupted_shows_one_line(cells: Kernel) -> None:
    cells.run("%load_ext nqnb")
    waits = cells.start_waiting("%nq submit nobody 1 --wait")
    cells.interrupt()
    assert cells.end(waits).traceback == "nqnb: interrupted"


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_failed_task_shows_the_line_of_its_handler(cells: Kernel, isolation: str) -> None:
    if isolation == "process" and os.name != "posix":
        pytest.skip("a process needs POSIX")
    cells.run(BAD.replace('"bad"', f'"{isolation}", isolation="{isolation}"'))
    for line in (f"nq.submit({isolation!r}, 1).result(20)", f"await nq.submit({isolation!r}, 2)"):
        cell = cells.end(cells.start(line))
        callers, _, handlers = cell.traceback.partition("The handler's traceback (most recent call last):\n")
        assert f"--> 1 {line}\n" in callers
        assert handlers.count("  Cell In[") == 2
        assert '    raise ValueError("oh no")\n' in handlers
        assert handlers.endswith("ValueError: oh no")
        for own in (str(Path(nqnb.__file__).parent), "nqnb.worker", "File ", "dynamic-code"):
            assert own not in cell.traceback


def test_a_server_that_is_gone_shows_the_line_of_the_cell_alone(tmp_path: Path) -> None:
    with kernel(tmp_path) as alone:
        with nqnb.DevServer() as server:
            alone.run(f"import nqnb\nnq = nqnb.session({server.url!r}, request_timeout=0.5, retry_for=1)")
        check_frames(alone.end(alone.start("nq.submit('resize', 1)")), "nq.submit('resize', 1)")


def test_a_client_without_a_session_shows_the_line_of_the_cell_alone(tmp_path: Path) -> None:
    with kernel(tmp_path) as alone:
        line = "await nqnb.connect('nats://127.0.0.1:1', connect_timeout=0.2)"
        check_frames(alone.end(alone.start(f"import nqnb\n{line}")), line)
