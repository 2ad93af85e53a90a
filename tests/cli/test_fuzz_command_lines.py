"""Random command lines and magics: each ends with a documented exit code, a short error, and no traceback."""

from __future__ import annotations

import io
import random
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.bad_values import fuzzed, text
from helpers.command_line import NOBODY, Start, ended, environment, start
from helpers.ipython_shell import Shell, shell
from hypothesis import given
from hypothesis import strategies as st

import nqnb
from nqnb.cli import main
from nqnb.commands.command_tree import tree
from nqnb.notebook.magics.nq_commands import tree as magics

__all__ = ["start"]  # the fixture

CODES = {0, 1, 2, 3, 130}
MAX_ERROR_CHARACTERS = 8_000
"""The longest stderr of one command line."""

RUN = {
    *("tasks", "queues", "workers", "version", "cancel", "submit", "prune"),
    *("task status", "task show", "task result", "task list", "task cancel", "task requeue"),
    *("queue list", "queue stats", "queue limit", "queue pause", "queue resume", "queue purge", "queue delete"),
}
"""Commands that may run. All others, new ones too, serve, watch or start something: their lines end in `REFUSED`."""
REFUSED = "--no-such-option"

VALUES = [
    *("", " ", "-", "--", "=", "0", "-1", "1e400", "nan", "inf", "9" * 400, "٣", "10m", "1d1d", "5x", "0x10", "1_000"),
    *(
        "fuzz",
        "missing",
        "ended",
        "nobody",
        "a b",
        "é",
        "\udcff",
        "\ud800",
        "x" * 5000,
        "../..",
        "/",
        "~",
        "a\nb",
        "\x1b[0m",
    ),
    *(
        "failed",
        "faild",
        "pending",
        "{",
        '{"a": 1}',
        "[1, null]",
        "null",
        "2030-01-01",
        "9999-12-31T23:59",
        "0001-01-01",
    ),
    *("0001-01-01T00:00+23:59", "%s", "$HOME", "`id`", "'", '"', "\\", "*", "@file", "--json", "-h", "true"),
]

GOOD = {
    "queue_name": ("fuzz", "fuzz", "missing"),
    "task_id": ("ended", "nobody"),
    "seconds": ("10m", "1", "1.5s"),
    "moment": ("1h", "2100-01-01T00:00Z"),
    "future_moment": ("1h",),
    "status": ("failed", "pending"),
    "open_status": ("pending",),
}
"""Valid values, by the type of an option or argument."""

NEVER = ("--wait", "--file", "--out", "-o", "--tlsfirst")
"""Options that wait for a task without a worker or for a server without TLS, write variables, or read files."""


def commands_of(root: click.Command) -> dict[str, click.Command]:
    """Return every command and group of a tree by its words."""
    found: dict[str, click.Command] = {"": root}
    for words, command in found.copy().items():
        _add(found, words, command)
    return found


def _add(found: dict[str, click.Command], words: str, command: click.Command) -> None:
    for name, each in getattr(command, "commands", {}).items():
        found[f"{words} {name}".strip()] = each
        _add(found, f"{words} {name}".strip(), each)


def line_of(seed: int, commands: dict[str, click.Command]) -> list[str]:
    """Return a command with options and arguments, some of them valid."""
    draw = random.Random(seed)
    words = draw.choice(list(commands)) if draw.random() < 0.2 else draw.choice(sorted(RUN))
    command = commands[words]
    line = words.split()
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    options = [each for each in command.params if isinstance(each, click.Option)]
    for argument in arguments:
        if draw.random() < 0.8:
            line.append(value_of(draw, argument))
    for option in draw.sample(options, min(len(options), draw.randrange(3))):
        name = draw.choice(option.opts)
        if name in ("--url", "-u"):
            # Any other address could reach a server of another user.
            line += [name, draw.choice((NOBODY, "", "nats://", "http://127.0.0.1", "nats://a b", "nats://u:p@[::"))]
        elif name not in NEVER:
            line += [name] if option.is_flag and draw.random() < 0.9 else [name, value_of(draw, option)]
    if draw.random() < 0.2 and line:
        at = draw.randrange(len(line))
        line[at] = line[at][: draw.randrange(5)] + text(draw)
    line = [word for word in line if not word.startswith(NEVER)]
    if not any(" ".join(line).startswith(f"{each} ") or " ".join(line) == each for each in RUN):
        return [*line, REFUSED]
    return [*line, "--timeout", "5"] if line[:2] == ["task", "result"] else line


def value_of(draw: random.Random, param: click.Parameter) -> str:
    """Return a value for an option or argument: valid, invalid, or any text."""
    chance = draw.random()
    if chance < 0.6:
        return draw.choice(GOOD.get(param.type.name, ("1", "a")))
    return draw.choice(VALUES) if chance < 0.9 else text(draw)


@pytest.fixture(scope="module")
def address() -> Any:
    with nqnb.DevServer() as server:
        assert main(["-u", server.url, "submit", "fuzz", "1", "--id", "ended"]) == 0
        assert main(["-u", server.url, "task", "cancel", "ended"]) == 0
        yield server.url


@pytest.mark.timeout(3600)  # for --full
def test_random_command_lines_end_with_a_documented_code(
    address: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, full = 400, 25_000
    whole = request.config.getoption("--full")
    commands = commands_of(tree)
    codes: Counter[int] = Counter()
    monkeypatch.setenv("NATS_URL", address)

    @fuzzed(inputs, full, whole=whole)
    @given(st.integers(0, 2**64 - 1))
    def fuzz(seed: int) -> None:
        line = line_of(seed, commands)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1\n2")))
        capsys.readouterr()
        code = main(line)
        out, err = capsys.readouterr()
        codes[code] += 1
        assert code in CODES, line
        assert "Traceback" not in out + err, line
        assert len(err) < MAX_ERROR_CHARACTERS, line
        assert code == 0 or err, line

    fuzz()
    with capsys.disabled():
        print(f"{sum(codes.values()):,} command lines: {dict(sorted(codes.items()))}")
    assert {0, 1, 2, 3} <= set(codes)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
@pytest.mark.parametrize("option", ["--creds", "--tlsca"])
def test_an_impossible_path_is_refused(option: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-u", NOBODY, "tasks", option, path]) == 2
    assert "it contains a null character or a lone surrogate" in capsys.readouterr().err


def test_a_payload_with_half_a_surrogate_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-u", NOBODY, "submit", "fuzz", "\ud800"]) == 2
    assert "contains a lone surrogate" in capsys.readouterr().err


def test_random_command_lines_as_processes_end_with_a_documented_code(address: str, start: Start) -> None:
    """Run some as processes, where words are bytes and streams are real."""
    commands = commands_of(tree)
    running = []
    for seed in range(6):
        line = [word.replace("\0", "").encode("utf-8", "replace").decode() for word in line_of(seed * 7 + 1, commands)]
        running.append((line, start(*line, NATS_URL=address)))
    for line, process in running:
        answer = ended(process)
        assert answer.code in CODES, (line, answer)
        assert "Traceback" not in answer.err, (line, answer)


def test_a_command_line_that_is_not_utf_8_is_refused(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nqnb", "tasks", b"\xff\xfe", b"--status", b"\xf0"],
        env=environment(NATS_URL=address),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


@pytest.fixture
def cells(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> Any:
    monkeypatch.setenv("NATS_URL", address)  # without it, a line with an empty address starts the server of the user
    with shell(capsys, monkeypatch, str(tmp_path)) as made:
        made.run("%load_ext nqnb")
        made.run(f"%nq up {address} -q")
        yield made


@pytest.mark.timeout(3600)  # for --full
def test_random_magics_raise_only_errors_of_nqnb(
    cells: Shell, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, full = 300, 15_000
    whole = request.config.getoption("--full")
    commands = commands_of(magics)
    ends: Counter[str] = Counter()

    @fuzzed(inputs, full, whole=whole)
    @given(st.integers(0, 2**64 - 1))
    def fuzz(seed: int) -> None:
        words = line_of(seed, commands)
        line = (
            (shlex.join(words) if seed % 3 else " ".join(words)).replace("\n", " ").replace("\r", " ").replace("\0", "")
        )
        if line.rstrip().endswith(("?", "\\")):  # IPython's own help, and a line that continues
            line += " ."
        ran = cells.attempt(f"get_ipython().run_line_magic('nq', {line!r})")
        ends[type(ran.error).__name__] += 1
        assert ran.error is None or isinstance(ran.error, nqnb.NqnbError), (line, ran.error)
        assert "Traceback" not in ran.out + ran.err, line
        assert ran.error is None or len(ran.out + ran.err) < MAX_ERROR_CHARACTERS, line

    fuzz()
    with capsys.disabled():
        print(f"{sum(ends.values()):,} magics: {dict(sorted(ends.items()))}")
    assert {"NoneType", "BadInput", "UnknownTask"} <= set(ends)
