"""A real IPython shell that runs cells in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config


@dataclass
class Ran:
    """The result of a cell."""

    value: Any
    """The value of its last line."""
    error: BaseException | None
    out: str
    err: str


class Shell:
    """An IPython shell. Create one with `shell`."""

    def __init__(self, ip: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
        self.ip = ip
        self._capsys = capsys

    def run(self, cell: str) -> Ran:
        """Run a cell that must not fail."""
        ran = self.attempt(cell)
        assert ran.error is None, f"{cell}\n{ran}"
        return ran

    def attempt(self, cell: str) -> Ran:
        """Run a cell that may fail."""
        self._capsys.readouterr()
        result = self.ip.run_cell(cell)  # type: ignore[no-untyped-call]  # it has no types
        return Ran(result.result, result.error_before_exec or result.error_in_exec, *self._capsys.readouterr())

    def refused(self, cell: str) -> str:
        """Run a cell that must fail with one line and no traceback. Return the line."""
        ran = self.attempt(cell)
        assert ran.error is not None, ran
        said = [line for line in (ran.out + ran.err).splitlines() if line]
        assert len(said) == 1, ran
        assert said[0].startswith("nqnb: "), ran
        return said[0]

    def refused_after(self, cell: str) -> str:
        """Run a cell that must fail with one line after other output. Return the line."""
        ran = self.attempt(cell)
        assert ran.error is not None, ran
        last = ran.out.splitlines()[-1]
        assert last.startswith("nqnb: "), ran
        assert "Traceback" not in ran.out, ran
        return last

    def completed(self, cell: str) -> list[str]:
        """Return the completions at the end of a cell."""
        with provisionalcompleter():
            return [each.text for each in self.ip.Completer.completions(cell, len(cell))]


@contextmanager
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str) -> Iterator[Shell]:
    """Create a shell with its files in a folder. Remove all traces of it at the end of the block."""
    monkeypatch.setenv("IPYTHONDIR", folder)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    for name in ("excepthook", "ps1", "ps2", "ps3"):
        monkeypatch.setattr(sys, name, getattr(sys, name, ""), raising=False)
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    ip = InteractiveShell.instance(config=config)
    try:
        yield Shell(ip, capsys)
    finally:
        manager = ip.extension_manager
        if manager is not None and "nqnb" in manager.loaded:
            manager.unload_extension("nqnb")
        ip.run_line_magic("reset", "-f")
        InteractiveShell.clear_instance()
