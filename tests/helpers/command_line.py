"""Command lines for tests: run in this process, or started in another one."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nqnb
from nqnb.cli import main

NOBODY = "nats://127.0.0.1:1"
"""An address without a server."""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]
Many = Callable[[str, int], list[str]]
Start = Callable[..., "subprocess.Popen[str]"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
    # The package and the folder of the tests, for tests that run their own file as a program.
    path = os.pathsep.join(map(str, (Path(nqnb.__file__).parents[1], Path(__file__).parents[1])))
    return {**kept, "PYTHONPATH": path, **more}


def ended(process: subprocess.Popen[str]) -> Answer:
    out, err = process.communicate(timeout=60)
    return Answer(process.returncode, out, err)


def until_said(process: subprocess.Popen[str], text: str) -> None:
    """Read stderr until a line contains ``text``."""
    assert process.stderr is not None
    while text not in (said := process.stderr.readline()):
        assert said, f"the process ended without {text!r}"


def one_line(text: str) -> bool:
    return text.startswith("nqnb: ") and text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Start a server for all tests of a module."""
    with nqnb.DevServer() as server:
        yield server.url


@pytest.fixture
def run(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command line in this process, with the server's address before it."""

    def run(*arguments: str, stdin: bytes = b"", server: str = url) -> Answer:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["-u", server, *arguments])
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def many(run: Run) -> Many:
    """Return a function that submits a number of tasks to a queue and returns their ids."""

    def many(queue: str, count: int) -> list[str]:
        lines = "\n".join(map(str, range(count))).encode()
        ids: list[str] = run("submit", queue, "--lines", "-", "--json", stdin=lines).json["ids"]
        return ids

    return many


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Return a function that starts a command line in another process, which is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "nqnb", *arguments],
                cwd=cwd,
                env=environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
