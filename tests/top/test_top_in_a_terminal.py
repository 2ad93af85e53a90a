"""``nqnb top`` as a program: in a real pseudo-terminal, without a terminal, and without textual."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pyte
import pytest
from helpers.command_line import Run, environment, one_line

import nqnb

ROWS, COLUMNS = 30, 100
NORMAL_SCREEN = b"\x1b[?1049l"
"""What a program writes to leave the full screen. pyte does not know it."""


class Terminal:
    """A program in a pseudo-terminal, whose output a terminal in memory interprets."""

    def __init__(self, *arguments: str, **more: str) -> None:
        self.screen = pyte.Screen(COLUMNS, ROWS)
        self.output = b""
        self._stream = pyte.ByteStream(self.screen)
        self._primary, secondary = pty.openpty()
        ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.program = subprocess.Popen(
            [sys.executable, "-m", "nqnb", *arguments],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            env=environment(TERM="xterm-256color", COLORTERM="truecolor", **more),
        )
        os.close(secondary)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def press(self, keys: str) -> None:
        os.write(self._primary, keys.encode())

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text
            if select.select([self._primary], [], [], 0.05)[0]:
                try:
                    data = os.read(self._primary, 65536)
                    self.output += data
                    self._stream.feed(data)
                except OSError:  # the program has ended
                    time.sleep(0.05)

    def until_shown(self, *words: str) -> None:
        self.until(lambda: any(all(word in each for word in words) for each in self.screen.display))

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._primary)


@contextmanager
def terminal(*arguments: str, **more: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments, **more)
    try:
        yield opened
    finally:
        opened.close()


def test_without_a_terminal_it_refers_to_watch(run: Run) -> None:
    for arguments in (["top"], ["top", "--json"]):
        answer = run(*arguments)
        assert answer.code == 2
        assert "nqnb watch" in answer.err
    assert one_line(run("top").err)


@pytest.mark.full
def test_a_cancel_works_in_a_real_terminal(run: Run, url: str) -> None:
    task_id = run("submit", "resize", '{"path": "\\u001b[2Jcat.png"}', "--json").json["id"]
    with terminal("-u", url, "top", "resize") as top:
        top.until_shown("pending", task_id, "\\x1b[2Jcat.png")
        top.until_shown("q Quit")
        top.press("\x1b[B")  # the arrow key down
        top.press("c")
        top.until_shown("deleted", task_id)
        assert run("task", "status", task_id, "--json").json["status"] == "deleted"
        top.press("q")
        top.until(lambda: top.program.poll() is not None)
        assert top.program.returncode == 0
        top.until(lambda: NORMAL_SCREEN in top.output)


@pytest.mark.full
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_restores_the_terminal(url: str, stop: signal.Signals) -> None:
    with terminal("-u", url, "top") as top:
        top.until_shown("live")
        os.kill(top.program.pid, stop)
        top.until(lambda: top.program.poll() is not None)
        assert top.program.returncode == 0
        top.until(lambda: NORMAL_SCREEN in top.output)


@pytest.mark.full
def test_cancels_that_are_not_confirmed_are_counted_after_a_signal(run: Run, server: nqnb.DevServer) -> None:
    task_id = run("submit", "resize", "--json", server=server.url).json["id"]
    with terminal("-u", server.url, "top") as top:
        top.until_shown("pending", task_id)
        server.kill()
        top.until_shown("connection lost")
        top.press("\x1b[B")  # the arrow key down
        top.press("c")
        top.until_shown("cancel not sent yet", task_id)
        os.kill(top.program.pid, signal.SIGTERM)
        top.until(lambda: b"the server has not confirmed some changes, which may be lost: 1 cancel." in top.output)
        top.until(lambda: top.program.poll() is not None)


@pytest.mark.full
def test_without_textual_it_names_the_extra(url: str, tmp_path: Path) -> None:
    (tmp_path / "textual").mkdir()
    (tmp_path / "textual" / "__init__.py").write_text("raise ImportError('no textual here')")
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    with terminal("-u", url, "top", PYTHONPATH=path) as top:
        top.until(lambda: top.program.poll() is not None)
        top.until(lambda: "pip install 'nqnb[top]'" in top.text.replace("\n", ""))
        assert top.program.returncode == 1
