"""Which notebook and which cell submitted a task, and what is left out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kernels import Kernel, kernel

import nqnb
from nqnb.notebook.cell_source import first_line, is_here
from nqnb.protocol.wire import Source

OPEN = "import nqnb, threading\nnq = nqnb.session({url!r})"


@pytest.fixture
def cells(server: nqnb.DevServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Start the kernel of a notebook, as Jupyter Server does."""
    monkeypatch.setenv("JPY_SESSION_NAME", "home/ann/secret folder/sweep.ipynb")
    with kernel(tmp_path) as started:
        started.run(OPEN.format(url=server.url))
        yield started


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("", ""),
        ("\n  # a token: abc\n\n tasks = nq.map(queue, df)  # of /home/ann\nmore()", "tasks = nq.map(queue, df)"),
        ("nq = nqnb.session('nats://ann:pw@host')", "nq = nqnb.session('…')"),
        ('x = f("a\\"b#", \'c\', """d\ne""")', 'x = f("…", \'…\', """…"""'),
        ("x = 'never ends", "x = '…'"),
        ("%nq submit resize --token abc", "%nq submit …"),
        ("%%nq handler resize /home/ann", "%%nq handler …"),
        ("!curl -H token https://host", "!curl …"),
        ("%env KEY=abc", "%env …"),
        ("x = !curl -H token", "x = !curl …"),
        ("a, b['c='] = !!curl -H token", "a, b['…'] = !!curl …"),
        ("x=%env KEY abc", "x=%env …"),
        ("t = %nq submit resize --text abc", "t = %nq submit …"),
        ("!curl http://ann:secret@host/api?q=%22abc%22", "!curl …"),
        ("%env PASSWORD=!hunter2", "%env …"),
        ("!mysql --password=%secret9 db", "!mysql …"),
        ("%nq submit resize --text=%secret9", "%nq submit …"),
        ("x = !mysql --password=%secret9 db", "x = !mysql …"),
        ("x = 7 % y != '=%s'", "x = 7 % y != '…'"),
        ("x = 1\x1b[31m", "x = 1\\x1b[31m"),
        ("y" * 100, "y" * 79 + "…"),
    ],
)
def test_the_first_line_has_no_string_no_comment_and_no_argument_of_a_magic(code: str, text: str) -> None:
    assert first_line(code) == text


def test_a_notebook_is_known_by_its_kernel_or_its_file() -> None:
    here = Source("sweep.ipynb", 3, "", "k1")
    assert is_here(Source("", 1, "", "k1"), here)
    assert is_here(Source("sweep.ipynb", 1, "", "k2"), here)
    assert not is_here(Source("other.ipynb", 1, "", "k2"), here)
    assert not is_here(Source("", 1, "", "k2"), Source("", 1, "", "k1"))
    assert not is_here(Source("other.ipynb", 1, "", ""), Source("mine.ipynb", 1, "", "")), "both kernels are unknown"
    assert not is_here(None, here)
    assert not is_here(here, None)


def test_each_kernel_that_a_program_embeds_has_its_own_id(tmp_path: Path) -> None:
    """The arguments of ``embed_kernel`` are traits of the application, not part of its configuration."""
    code = f"""
import os, sys
from ipykernel.kernelapp import IPKernelApp
IPKernelApp.instance(connection_file={str(tmp_path / "kernel.json")!r}).initialize([])
from nqnb.notebook.cell_source import current_source
print("id:", current_source().kernel, file=sys.__stdout__, flush=True)
os._exit(0)
"""
    environment = {**os.environ, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    found = set()
    for _ in range(2):
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found.add(ran.stdout.partition("id: ")[2].strip())
    assert len(found - {""}) == 2


def test_tasks_remember_their_notebook_and_cell(cells: Kernel, server: nqnb.DevServer) -> None:
    other = nqnb.session(server.url)
    elsewhere = other.submit("resize", 0)
    cells.run("# sweep\ntasks = nq.map('resize', [1, 2])\none = nq.submit('resize', 3, key='three')")
    cells.run("thread = threading.Thread(target=lambda: nq.submit('resize', 4)); thread.start(); thread.join()")
    try:
        infos = {int(info.payload): info for info in other.call(other.client.tasks())}
        sources = {number: info.source for number, info in infos.items()}
        assert sources[0] is None
        assert sources[1] == sources[2] == sources[3]
        assert sources[1] is not None
        assert sources[4] is not None
        cell = sources[1].cell
        assert f"{sources[1]}" == f"sweep.ipynb [{cell}] tasks = nq.map('…', [1, 2])"
        assert sources[1].kernel == sources[4].kernel != ""
        assert (sources[4].notebook, sources[4].cell, sources[4].line) == ("sweep.ipynb", 0, "")
        assert other.tasks()["source"].dropna().unique().tolist() == [f"{sources[1]}", "sweep.ipynb"]
        assert len(other.tasks(cell="nq.map")) == 3
        assert other.tasks(here=True).empty
        assert len(other.here()) == 0
        other.cancel(infos[1].id)
        assert other.requeue(infos[1].id).fetch().source == sources[1]
    finally:
        other.down()
    code = f"print(*(len(nq.tasks('resize', cell={cell} + n)) for n in (-1, 0, 1)), end=' ')\n"
    code += "print(len(nq.tasks(here=True)), len(nq.tasks()), end=' ')\n"
    code += "print(nq.here().ids == tasks.ids + [one.id] + nq.here().ids[3:])"
    assert cells.run(code).stdout == "0 4 0 5 6 True\n"
    assert elsewhere.id not in cells.run("print(nq.here().ids)").stdout
    cells.manager.restart_kernel()
    cells.client.wait_for_ready(timeout=60)
    cells.run(OPEN.format(url=server.url))
    assert cells.run("print(len(nq.here()))").stdout == "5\n"


def test_an_invalid_cell_is_refused(server: nqnb.DevServer) -> None:
    nq = nqnb.session(server.url)
    try:
        for wrong in (0, 1.5, True, [1]):
            with pytest.raises(nqnb.BadInput, match="cell="):
                nq.tasks(cell=wrong)  # type: ignore[arg-type]  # that is what is tested
    finally:
        nq.down()
