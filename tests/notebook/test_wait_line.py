"""The line that a waiting call shows: what its tasks are doing, and why they have not ended."""

from __future__ import annotations

import io
import re
import sys
import threading
from collections.abc import Iterator

import pytest
from helpers.kernels import Cell, Kernel, kernel
from helpers.waiting import until, until_async

import nqnb
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.notebook.session import Session

HANDLER = """
import threading, datetime
free = threading.Event()

@nq.handler("held", concurrency=1)
def held(job, payload):
    job.progress(2, 5)
    while not free.wait(0.05): pass
    return payload

running = nq.submit("held", 0)
tasks = nq.map("held", range(1, 38), ordered=True)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Start a kernel with a session, a handler that holds its task, and a task of a queue without workers."""
    with nqnb.DevServer() as server, kernel(tmp_path_factory.mktemp("kernel")) as made:
        made.run(f"import nqnb\nnq = nqnb.session({server.url!r})\nlost = nq.submit('nobody', 1)")
        made.run(HANDLER)
        made.run("import time\nwhile running.status() is not nqnb.Status.PROCESSING: time.sleep(0.05)")
        yield made
        made.run("free.set()")


def interrupted_at(cells: Kernel, code: str, said: str) -> Cell:
    """Run a cell until it has shown a string, interrupt it, and return what it shows afterwards."""
    waits = cells.start(code)
    cells.until(waits, said)
    cells.interrupt()
    return cells.end(waits)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("lost.result()", "no worker serves queue 'nobody'"),
        ("nq.wait(lost.id)", "no worker serves queue 'nobody'"),
        ("running.result()", "processing 40 %"),
        ("tasks[-1].wait()", "pending, 36 ahead"),
        ("tasks.results()", "0 of 37 tasks ended, 37 pending"),
        ("(tasks[:3] + [running, lost]).wait()", "1 processing, 4 pending, no worker serves queue 'nobody'"),
        ("nq.submit('held', 1, process_at=datetime.timedelta(hours=1)).result()", "scheduled, due at "),
    ],
)
def test_a_call_says_what_it_waits_for(cells: Kernel, code: str, said: str) -> None:
    cell = interrupted_at(cells, code, said)
    assert re.search(r"waited \d+ s(: 0 of \d+ tasks ended| for task \w+)\n$", cell.text), cell
    if "process_at" in code:
        # On a server without schedules, the task would wait in the queue, ahead of the tasks of other tests.
        cells.run("nq.interrupted.cancel()")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("task result $running", "processing 40 %"),
        ("submit held 1 --wait", "pending, 37 ahead"),
        ("submit nobody 1 --wait", "pending, no worker serves queue 'nobody'"),
    ],
)
def test_a_command_says_what_it_waits_for(cells: Kernel, command: str, said: str) -> None:
    cells.run("%load_ext nqnb")
    cell = interrupted_at(cells, f"%nq {command}", said)
    assert re.search(r"waited \d+ s for task \w+\n$", cell.text), cell
    assert cell.traceback == "nqnb: interrupted"
    cells.run("nq.interrupted.cancel() if nq.interrupted[0] != running else None")


def test_a_quiet_command_shows_nothing(cells: Kernel) -> None:
    cells.run("%load_ext nqnb")
    waits = cells.start(
        "import threading, _thread\nthreading.Timer(2.5, _thread.interrupt_main).start()\n%nq task result $running -q"
    )
    assert "processing" not in cells.end(waits).text


@pytest.mark.full
def test_all_calls_of_a_cell_share_one_line(cells: Kernel) -> None:
    code = "for each in (running, tasks[-1], lost):\n  try: each.wait(2.5)\n  except nqnb.WaitTimeout: pass"
    cell = cells.run(code)
    assert cell.text.count("waited ") == 3, cell
    assert cell.displays == 1


def test_a_loop_over_tasks_counts_all_its_tasks_and_its_whole_time(cells: Kernel) -> None:
    cells.run(
        "begin = threading.Event()\n@nq.handler('steps', concurrency=1)\n"
        "def steps(job, seconds): begin.wait(60); time.sleep(seconds)"
    )
    cells.run("steps = nq.map('steps', [2, 2, 0], ordered=True)")
    cell = cells.run("begin.set()\nfor task in steps.completed(): print(task.id)")
    assert {*re.findall(r"of (\d+) tasks", cell.text)} == {"3"}, cell
    assert re.search(r"waited \d+ s: 3 of 3 tasks ended\n$", cell.text), cell
    assert int(re.findall(r"(\d+) s", cell.text)[-1]) >= 4, cell
    assert cell.displays == 1


def test_a_quick_call_shows_nothing(cells: Kernel) -> None:
    cells.run("quick = nq.submit('quick', 1)\nreceipt = quick.cancel()")
    assert cells.run("status = quick.wait()").text == ""


def test_a_displayed_task_says_that_no_worker_serves_its_queue(cells: Kernel) -> None:
    (page,) = cells.run("lost").html
    assert "pending, no worker serves queue &#x27;nobody&#x27;" in page
    page, *_ = cells.run("tasks[:2] + [lost]").html
    assert "3 pending; no worker serves queue &#x27;nobody&#x27;" in page
    assert "no worker" not in "".join(cells.run("tasks").html + cells.run("running").html)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def session(server: nqnb.DevServer) -> Iterator[Session]:
    made = nqnb.session(server.url)
    yield made
    made.down()


def test_a_terminal_shows_the_line_and_removes_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    task = session.submit("nobody", 1)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = f"\r\x1b[Ktask {task.id}: pending, no worker serves queue 'nobody', "

    def cancel() -> None:
        until(lambda: line in terminal.getvalue(), 60)
        task.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    assert task.wait(100) is nqnb.Status.DELETED
    thread.join()
    assert terminal.getvalue().endswith("s\r\x1b[K")


def test_a_program_without_a_terminal_shows_nothing(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(nqnb.WaitTimeout):
        session.submit("nobody", 1).wait(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.anyio
async def test_the_place_in_a_queue(nq: nqnb.Client) -> None:
    tasks = await nq.submit_many("line", range(10), ordered=True)
    backend = nq.backend
    numbers = [(await task.fetch()).sequence for task in tasks]
    assert await backend.place_of("line", numbers[9]) is None
    await ensure_consumer(backend.connection, await backend.ensure_queue("line"))
    assert [await backend.place_of("line", number) for number in numbers] == [(place, place) for place in range(10)]

    # Messages that were deleted before or after it are unknown.
    await tasks[4].cancel()

    async def deleted() -> bool:
        return await backend.place_of("line", numbers[9]) == (8, 8)

    await until_async(deleted)
    assert await backend.place_of("line", numbers[6]) == (5, 6)
    assert await backend.place_of("no-such-queue", 1) is None
