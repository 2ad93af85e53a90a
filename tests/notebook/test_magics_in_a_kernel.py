"""The magics in a real kernel: questions, interrupts, progress, Run All, nest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers.kernels import PATIENCE, Cell, Kernel, kernel
from helpers.waiting import until
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import nqnb


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel with the extension, connected to its own server."""
    with nqnb.DevServer() as server, kernel(tmp_path_factory.mktemp("kernel")) as made:
        made.run(f"%load_ext nqnb\nnq = %nq up {server.url}")
        yield made


def answered(cells: Kernel, code: str, answer: str) -> tuple[str, Cell]:
    """Run a cell that asks, and answer; return the question and the ended cell."""
    asking = cells.client.execute(code, allow_stdin=True)
    question = cells.client.get_stdin_msg(timeout=PATIENCE)["content"]["prompt"]
    cells.client.input(answer)
    return question, cells.end(asking)


class TestConfirm:
    def test_the_user_is_asked_in_the_page(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('asks', 1)")
        question, cell = answered(cells, "%nq queue purge asks", "n")
        assert question == "Remove 1 waiting task from queue 'asks'? [y/N]: "
        assert cell.error == "NqnbError: nothing was purged: you did not confirm. Answer y, or add --yes."
        question, cell = answered(cells, "%nq queue purge asks", "y")
        assert not cell.error
        assert cells.run("print(task.status().label)").stdout == "deleted\n"

    def test_a_front_end_without_a_user_is_refused(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('nobody', 1)")
        cell = cells.end(cells.client.execute("%nq cancel --queue nobody", allow_stdin=False))
        why = "cannot ask for confirmation: this notebook is not running interactively"
        assert cell.error == f"NeedsYes: {why}. Add --yes to answer yes to: Cancel 1 task?"
        assert cells.run("print(task.status().label)").stdout == "pending\n"

    def test_run_all_is_refused_and_no_cell_is_lost(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('all', 1)\nnumbers = []")
        options: dict[str, Any] = {"allow_stdin": True, "stop_on_error": False}
        first = cells.client.execute("%nq cancel --queue all", **options)
        others = [cells.client.execute(f"numbers.append({number})", **options) for number in range(10)]
        error = cells.end(first).error
        assert error.startswith("NeedsYes: cannot ask for confirmation: other cells are queued")
        assert error.endswith("add --yes to answer yes to: Cancel 1 task?")
        for each in others:
            cells.end(each)
        assert cells.run("print(len(numbers), task.status().label)").stdout == "10 pending\n"

    def test_cells_that_arrive_during_a_question_run_after_it(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('later', 1)")
        asking = cells.client.execute("%nq cancel --queue later", allow_stdin=True)
        cells.client.get_stdin_msg(timeout=PATIENCE)
        behind = cells.client.execute("print('ran')")
        time.sleep(0.3)
        cells.client.input("y")
        cells.end(asking)
        assert cells.end(behind).stdout == "ran\n"


class TestInterrupt:
    @pytest.mark.parametrize("line", ["task result {id}", "submit waits 1 --wait"])
    def test_an_interrupt_ends_a_wait_in_one_line(self, cells: Kernel, line: str) -> None:
        task_id = cells.run("task = nq.submit('waits', 1); print(task.id)").stdout.strip()
        waits = cells.start_waiting(f"%nq {line.format(id=task_id)}")
        cells.interrupt()
        cell = cells.end(waits)
        assert cell.error == "KeyboardInterrupt: "
        assert cell.seconds < 20  # half a second on an idle machine
        waited = cells.run("print(nq.interrupted[0].id)").stdout.strip()
        assert (waited == task_id) is not line.startswith("submit")
        assert cell.stderr == f"1 task is still pending; `%nq cancel {waited}` stops it\n"
        assert cells.run(f"print(nq.status({waited!r}).label)").stdout == "pending\n"

    def test_an_interrupt_cancels_where_the_session_is_set_to(self, cells: Kernel) -> None:
        cells.run("task = nq.submit('waits', 1)\nnq.cancel_on_interrupt = True")
        waits = cells.start_waiting("get_ipython().run_line_magic('nq', f'task result {task.id}')")
        cells.interrupt()
        cell = cells.end(waits)
        # The second cell, where a busy machine is slow.
        on_its_way = "interrupted: 1 task is being cancelled in the background\n"
        assert cell.stderr in ("interrupted: 1 task is cancelled\n", on_its_way), cell
        assert cells.run("nq.cancel_on_interrupt = False; print(task.wait(20).label)").stdout == "deleted\n"

    def test_an_interrupted_handler_cell_shows_its_line(self, cells: Kernel) -> None:
        waits = cells.start(
            "%%nq handler waits\nimport time\nprint('waits', flush=True)\ntime.sleep(30)\ndef f(job): pass"
        )
        cells.until(waits, "waits")
        time.sleep(0.2)
        cells.interrupt()
        assert cells.end(waits).error.startswith("KeyboardInterrupt")


class TestShows:
    def test_a_long_command_shows_its_progress(self, cells: Kernel) -> None:
        cell = cells.run("tasks = nq.submit_many('many', range(6000))\n%nq cancel --queue many --yes -o frame")
        assert "of 6,000 tasks cancelled" in cell.text
        assert "<progress" in cell.html[0]
        assert "6,000 of 6,000 tasks cancelled" in cell.html
        assert cells.run("print(len(frame), set(frame.status))").stdout == "6000 {'deleted'}\n"

    def test_a_call_that_cancels_many_tasks_shows_its_progress(self, cells: Kernel) -> None:
        cell = cells.run("tasks = nq.submit_many('called', range(6000))\nframe = tasks.cancel()")
        assert "<progress" in cell.html[0]
        assert "6,000 of 6,000 tasks cancelled" in cell.html
        assert "tasks cancelled" not in cells.run("frame = nq.submit_many('called', [1]).cancel()").text

    @pytest.mark.full
    def test_the_demo(self, cells: Kernel) -> None:
        cell = cells.run("%nq demo")
        assert "Every task ended as expected." in cell.stdout + cell.text
        assert len(cell.html) > 5

    def test_the_session_as_a_card_and_a_failure_as_one_line(self, cells: Kernel) -> None:
        assert "nqnb-card" in cells.run("%nq up").html[0]
        failed = cells.client.execute("%nq task show nobody")
        cells.end(failed)
        cell = cells.end(
            cells.client.execute(
                "try:\n    get_ipython().run_line_magic('nq', 'x y')\n"
                "except ValueError as error:\n    print(error._render_traceback_())"
            )
        )
        said = "command 'x' is unknown: %nq has no such command. Use --help to list the commands (see `%nq -h`)"
        assert cell.stdout == f'["nqnb: {said}"]\n'

    def test_a_handlers_cell_that_awaits(self, cells: Kernel) -> None:
        code = "%%nq handler awaits -c 3\nimport asyncio\nawait asyncio.sleep(0.01)\ndef awaits(job): return 'ran'\n"
        assert cells.run(code).stdout == "awaits runs the tasks of awaits in this kernel: thread, 3 at once\n"
        assert cells.run("%nq submit awaits --wait 10").text == "'ran'\n"
        cell = cells.end(cells.client.execute(f"{code}await asyncio.sleep(0)\n1 / 0"))
        assert cell.error == "ZeroDivisionError: division by zero"
        cell = cells.end(cells.client.execute(code.replace("-c 3", "-c x")))
        assert cell.error.startswith("BadInput: Invalid value for '--concurrency'")

    def test_nest_lets_cells_run_asyncio(self, cells: Kernel) -> None:
        said = cells.run("%nq nest").stdout
        assert "until the kernel restarts" in said
        assert "a third" in said
        assert cells.run("import nqnb; nqnb.nest()").stdout == said
        assert cells.run("import asyncio\nasync def one(): return 1\nprint(asyncio.run(one()))").stdout == "1\n"
        assert cells.run("print(len(nq.queues()) > 0)").stdout == "True\n"


def test_run_all_without_a_user_stops_at_the_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with nqnb.DevServer() as server:
        monkeypatch.setenv("NATS_URL", server.url)
        sources = [
            "%load_ext nqnb\n%nq up",
            "%%nq handler resize\ndef resize(job, payload):\n    return payload + 1",
            "%nq submit resize 1 --wait 20",
            "%nq queue delete resize --force",
            "print('not reached')",
        ]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in sources])
        client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
        with pytest.raises(CellExecutionError, match="Add --yes"):
            client.execute()
        assert [each.get("execution_count") for each in notebook.cells] == [1, 2, 3, 4, None]
        results = [
            each.data["text/plain"] for each in notebook.cells[2].outputs if each.output_type == "execute_result"
        ]
        assert results == ["2"]
        failed = [each for each in notebook.cells[3].outputs if each.output_type == "error"]
        assert [each.ename for each in failed] == ["NeedsYes"]
        assert len(failed[0].traceback) == 1


def test_an_output_that_is_replaced_between_cells_reaches_nbclient(cells: Kernel, tmp_path: Path) -> None:
    flag = tmp_path / "replaced"
    cells.run(
        "from threading import Timer\n"
        "from IPython.display import display\n"
        "from nqnb.widgets.jupyter_compat import replace\n"
        "display({'text/plain': 'live'}, raw=True, display_id='x')\n"
        "def later():\n    replace('x', {'text/plain': 'frozen'})\n"
        f"    open({str(flag)!r}, 'w').close()\n"
        "Timer(0.2, later).start()"
    )
    until(flag.exists)  # as with nbclient, which reads no messages between cells
    assert cells.run("pass").text == "frozen\n"
    assert cells.run("pass").text == "", "once is enough"
