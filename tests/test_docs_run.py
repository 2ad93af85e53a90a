"""The code blocks of the README and the docs run as they are written, on real servers and in a real kernel."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.docstring_examples import OLD
from helpers.kernels import Kernel, kernel
from test_docs import blocks, spans

import nqnb
from nqnb.frames import tasks_frame

NOTEBOOKS = ["README.md", "docs/notebook.md"]
"""The pages whose first block of Python is a notebook's cell."""
RUN = {
    "README.md": 1,
    "docs/notebook.md": 1,
    "docs/client.md": 1,
    "docs/doctor.md": 1,
    "docs/recurring.md": 1,
    "docs/worker.md": 8,
    "docs/settings.md": 2,
    "docs/limits.md": 1,
    "docs/moving.md": 2,
    "docs/operating.md": 1,  # tests/test_tracing.py runs it
}
"""The number of Python blocks that are run here, by page."""
SKIPPED_LINES = {
    "nqnb up": "it runs until Ctrl-C; the tests here start their own server",
    "nqnb worker": "it runs until Ctrl-C; `served` starts it",
    "nqnb watch": "it runs until Ctrl-C",
    "nqnb top": "it needs a terminal",
    "nqnb chaos": "it takes minutes; tests/chaos runs it",
}
"""The command lines that are not run, with the reason."""


SHELL_BLOCKS = {
    "docs/command-line.md": "run here",
    "docs/worker.md": "run here",
    "docs/operating.md": "they run until Ctrl-C; tests/metrics and tests/test_tracing.py start these commands",
    "docs/production.md": "they need Docker, Kubernetes, Slurm or the NATS CLI; tests/test_deploy.py checks the files",
    "README.md": "they install the project; `.ci/run` does this, then runs the tests, and tests/cli runs the demo",
    "CONTRIBUTING.md": "they install the project and run its tests, as `.ci/run` does",
    "docs/doctor.md": "tests/cli/test_doctor_command.py runs the same commands",
    "docs/recurring.md": "tests/cli/test_schedule_commands.py runs the same commands",
    "docs/chaos.md": "they take minutes; tests/chaos runs such attacks",
    "docs/performance.md": "they take minutes; tests/benchmarks has a test for each benchmark",
    "docs/permissions.md": "tests/jetstream/test_permissions.py does the same with the permissions of the page",
    "docs/versions.md": "it runs the tests on a server of the reader",
}
"""The pages with shell commands: those that are run here, and why the others are not."""


def programs_of(page: str) -> list[str]:
    """Return the Python code blocks of a page."""
    return [code for name, code in blocks("python") if name == page]


def test_every_python_block_is_run() -> None:
    assert {page: len(programs_of(page)) for page, _ in blocks("python")} == RUN


def test_every_page_with_shell_commands_is_run_or_has_a_reason() -> None:
    assert {page for page, _ in blocks("sh")} == set(SHELL_BLOCKS)


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Kernel]:
    """Start a kernel of a user who has no server yet, and stop the server that the cells start."""
    with kernel(tmp_path) as started:
        try:
            yield started
        finally:
            started.run("%load_ext nqnb\n%nq down --server --yes")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
@pytest.mark.parametrize("page", NOTEBOOKS)
def test_a_cell_of_the_docs_runs(newcomer: Kernel, page: str) -> None:
    (cell,) = programs_of(page)
    shown = newcomer.run(cell)
    assert "your detached server, started now" in shown.stdout
    assert shown.stderr == ""
    assert newcomer.run("tasks.results(60)").text.strip() == "[None, None, None]"
    assert newcomer.run("frame.empty if 'frame' in dir() else True").text.strip() == "True"


def test_the_notebook_page_says_how_to_list_failed_tasks(server: nqnb.DevServer) -> None:
    (query,) = (code for page, code in spans() if page == "docs/notebook.md" and code.startswith("tasks.df.query"))
    worker = nqnb.Worker(server.url)

    @worker.handler("divide")
    def divide(job: nqnb.Job, payload: int) -> float:
        return 1 / payload

    async def run() -> None:
        async with worker, nqnb.connect(server.url) as nq:
            good, bad = await nq.submit_many("divide", [1, 0], retry=0)
            await asyncio.gather(good.wait(30), bad.wait(30))
            tasks = SimpleNamespace(df=tasks_frame([await good.fetch(), await bad.fetch()]))
            failures = eval(query, {"tasks": tasks})  # noqa: S307  as below
            assert list(failures.index) == [bad.id]
            assert list(failures.payload) == [0]
            assert "ZeroDivisionError" in failures.error[bad.id]

    asyncio.run(run())


def environment(server: nqnb.DevServer) -> dict[str, str]:
    """Return the environment of a user of the server, whose shell finds `nqnb`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "NATS_URL": server.url, "PATH": path}


@contextmanager
def served(server: nqnb.DevServer, folder: Path, line: int) -> Iterator[None]:
    """Run the worker of docs/worker.md with one of the command lines of the page."""
    (folder / "jobs.py").write_text(programs_of("docs/worker.md")[0], encoding="utf-8")
    (lines,) = (code.splitlines() for page, code in blocks("sh") if page == "docs/worker.md")
    command = [sys.executable, "-m", *shlex.split(lines[line], comments=True)]
    with subprocess.Popen(command, cwd=folder, env=environment(server), stderr=subprocess.PIPE, text=True) as worker:
        try:
            yield
        finally:
            worker.terminate()
            print(worker.communicate(timeout=30)[1])  # pytest shows it if the test fails


def test_the_client_and_the_worker_of_the_docs_run(server: nqnb.DevServer, tmp_path: Path) -> None:
    (client,) = programs_of("docs/client.md")
    with served(server, tmp_path, 0):
        done = subprocess.run(
            [sys.executable, "-c", client],
            env=environment(server),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    states, result, receipt = done.stdout.splitlines()[:-2], *done.stdout.splitlines()[-2:]
    assert states[-1].startswith("completed ")
    assert result == "{'path': 'a.png'}"
    assert receipt.startswith(("cancelled ", "deleted "))


def test_the_programs_for_users_of_other_task_queues_run(server: nqnb.DevServer, tmp_path: Path) -> None:
    program, cell = programs_of("docs/moving.md")
    (tmp_path / "images.py").write_text(program, encoding="utf-8")
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment(server), "text": True}
    command = [sys.executable, "-m", "nqnb", "worker", "images:worker"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, **settings) as worker:
        try:
            for code in (["images.py"], ["-c", f"{cell}\nprint(tasks.results(60), len(frame))"]):
                done = subprocess.run([sys.executable, *code], capture_output=True, timeout=60, check=False, **settings)
                assert done.returncode == 0, done.stderr
                lines = done.stdout.splitlines()
                assert lines[0].startswith(("{'path': 'a.png', 'width': 800}", "[{'path': 'a.png', 'width': 800}, "))
        finally:
            worker.terminate()
            print(worker.communicate(timeout=30)[1])


def test_the_doctor_of_the_docs_runs(server: nqnb.DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = programs_of("docs/doctor.md")
    body = "".join(f"    {line}\n" for line in program.splitlines())
    names: dict[str, Any] = {}
    exec(f"async def examine(nq):\n{body}    return diagnosis\n", names)  # noqa: S102  that is what is tested

    async def run() -> None:
        async with nqnb.connect(server.url) as nq:
            await nq.submit("resize")
            assert not (await names["examine"](nq)).ok

    asyncio.run(run())
    assert "no-worker resize 0 Start a worker" in capsys.readouterr().out


def test_the_schedules_of_the_docs_are_stored(server: nqnb.DevServer) -> None:
    (program,) = programs_of("docs/recurring.md")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(server), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(maxsplit=2)[0] for line in done.stdout.splitlines()] == [
        "mornings 0 7 * * mon-fri Europe/Berlin",
        "poll every 5 minutes",
    ]


def test_the_limits_of_the_docs_are_set(
    server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATS_URL", server.url)
    names: dict[str, Any] = {}
    exec(programs_of("docs/limits.md")[0], names)  # noqa: S102  that is what is tested
    asyncio.run(names["main"]())
    assert capsys.readouterr().out == "100.0 5\n"


def test_the_settings_of_the_docs_are_accepted() -> None:
    exec(programs_of("docs/settings.md")[0], {})  # noqa: S102  that is what is tested


@pytest.mark.parametrize(("page", "count"), [("docs/worker.md", 6), ("docs/settings.md", 10)])
def test_the_tests_of_the_docs_pass(tmp_path: Path, page: str, count: int) -> None:
    programs: list[str] = []
    tests: list[str] = []
    for block in programs_of(page):
        (tests if re.search("def test_|class Test", block) else programs).append(block)
    (tmp_path / "jobs.py").write_text("\n\n".join(programs), encoding="utf-8")
    (tmp_path / "test_docs_block.py").write_text("\n\n".join(tests), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= count


def test_a_task_whose_code_does_not_stop_is_shown_as_in_the_docs(server: nqnb.DevServer) -> None:
    (sample,) = (code for page, code in blocks("text") if page == "docs/cancelling.md")
    worker = nqnb.Worker(server.url)
    started, release = threading.Event(), threading.Event()

    @worker.handler("train")
    def train(job: nqnb.Job, payload: dict[str, Any]) -> None:
        job.progress(3, 10, "epoch 3")
        started.set()
        release.wait(30)  # no exception is raised within threading

    async def shown() -> str:
        async with worker, nqnb.connect(server.url) as nq:
            task = await nq.submit("train", {})
            try:
                assert await asyncio.to_thread(started.wait, 30)
                while (await task.fetch()).progress is None:
                    await asyncio.sleep(0.05)
                assert (await task.cancel()).stopping
                command = [sys.executable, "-m", "nqnb", "task", "show", task.id]
                settings: dict[str, Any] = {"env": environment(server), "stdout": subprocess.PIPE}
                process = await asyncio.create_subprocess_exec(*command, **settings)
                return (await process.communicate())[0].decode()
            finally:
                release.set()

    def plain(text: str) -> str:
        text = re.sub(r"\S+@\S+(?=[,\n])", "USER", re.sub(r"(?<=task {7})\S+", "ID", text))
        return re.sub(r"w-\w+", "WORKER", re.sub(r"\d+:\d+:\d+( \([\d.]+m?s ago\))?", "TIME", text)).rstrip()

    assert plain(asyncio.run(shown())) == plain(sample)


@pytest.mark.skipif(os.name != "posix", reason="the lines are those of a POSIX shell")
def test_the_command_lines_of_the_docs_run(server: nqnb.DevServer, tmp_path: Path) -> None:
    lines = [line for page, code in blocks("sh") if page == "docs/command-line.md" for line in code.splitlines()]
    # The doctor reports an old server, and then exits with status 1.
    doctor = ("nqnb doctor",) if server.version.startswith(OLD) else ()
    run = [line for line in lines if not line.startswith((*SKIPPED_LINES, *doctor))]
    assert len(run) >= 12

    def shell(line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],  # noqa: S607  the shell of the docs
            cwd=tmp_path,
            env=environment(server),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    with served(server, tmp_path, 1):
        ended = shell('nqnb submit resize \'{"path": "b.png"}\'').strip()
        shell(f"nqnb task result {ended}")
        waiting = shell("nqnb submit resize --process-at 1h").strip()
        for line in run:
            shell(re.sub(r"\bID\b", waiting if line.startswith("nqnb task cancel") else ended, line))
