"""Real kernels: cells run in another process and can be interrupted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

PATIENCE = 60.0
"""Seconds after which a cell that has not ended fails its test."""

_TELL_A_WAIT = """
from nqnb.notebook.loop import LOOP as _loop

def _tell(before=_loop.meanwhile, looks=[]):
    if before is not None:
        before()
    looks.append(1)
    if len(looks) == 10:
        _loop.meanwhile = before
        print("it waits", flush=True)

_loop.meanwhile = _tell
"""
"""Prints a line in the next call that waits for nqnb, after ten polls. That is half a second: a quick call such as a
connect has ended by then."""


@dataclass
class Cell:
    """The output of a cell."""

    stdout: str = ""
    stderr: str = ""
    error: str = ""
    """The exception that ended it, or an empty string."""
    traceback: str = ""
    """What it showed of this exception, without colours."""
    text: str = ""
    """What it displayed, and the value of its last line, as plain text."""
    displays: int = 0
    """How many outputs it displayed. Their updates do not count."""
    html: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """The time from its start or its last interrupt to its end."""


class Kernel:
    """A kernel and its client. Create one with `kernel`."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client
        self._touched = 0.0

    def run(self, code: str) -> Cell:
        """Run a cell that must not fail."""
        cell = self.end(self.start(code))
        assert not cell.error, f"{code}\n{cell.error}\n{cell.stderr}\n{cell.stdout}"
        return cell

    def start(self, code: str) -> str:
        """Start a cell. `end` waits for it."""
        self._touched = time.monotonic()
        return str(self.client.execute(code))

    def start_waiting(self, code: str) -> str:
        """Start a cell that waits for nqnb, and return when it waits."""
        self.run(_TELL_A_WAIT)
        waits = self.start(code)
        self.until(waits, "it waits")
        return waits

    def interrupt(self) -> None:
        """Interrupt the kernel, as the stop button does."""
        self._touched = time.monotonic()
        self.manager.interrupt_kernel()

    def until(self, code_id: str, said: str) -> None:
        """Wait until a running cell has printed or displayed a string."""
        cell = Cell()
        end = time.monotonic() + PATIENCE
        while said not in cell.stdout + cell.text:
            self._read(code_id, cell, end)

    def end(self, code_id: str) -> Cell:
        """Wait for the end of a cell. Return its output since its start or the last call."""
        cell = Cell()
        end = time.monotonic() + PATIENCE
        while not self._read(code_id, cell, end):
            pass
        cell.seconds = time.monotonic() - self._touched
        reply: dict[str, Any] = {}
        while reply.get("parent_header", {}).get("msg_id") != code_id:
            reply = self.client.get_shell_msg(timeout=PATIENCE)
        return cell

    def _read(self, code_id: str, cell: Cell, end: float) -> bool:
        """Read one message. Return whether it reports the end of the cell."""
        try:
            message = self.client.get_iopub_msg(timeout=max(0.1, end - time.monotonic()))
        except Empty:
            raise AssertionError(f"the cell does not end; so far: {cell}") from None
        if message["parent_header"].get("msg_id") != code_id:
            return False
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            setattr(cell, content["name"], getattr(cell, content["name"]) + content["text"])
        elif kind == "error":
            cell.error = f"{content['ename']}: {content['evalue']}"
            cell.traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
        elif kind in ("execute_result", "display_data", "update_display_data"):
            cell.text += content["data"].get("text/plain", "") + "\n"
            cell.displays += kind == "display_data"
            cell.html += [content["data"]["text/html"]] if "text/html" in content["data"] else []
        return bool(kind == "status" and content["execution_state"] == "idle")


def started(**options: Any) -> tuple[KernelManager, BlockingKernelClient]:
    """Start a kernel, and again if another program took one of its ports between the choice and the start."""
    for attempt in range(3):
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(**options)
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=PATIENCE)
        except RuntimeError:
            client.stop_channels()
            if manager.is_alive() or attempt == 2:
                manager.shutdown_kernel(now=True)
                raise
            manager.cleanup_resources()
        else:
            return manager, client
    raise AssertionError("unreachable")


@contextmanager
def kernel(folder: Path, **variables: str) -> Iterator[Kernel]:
    """Start a kernel of a new user, with all its files in a folder.

    Args:
        folder: the folder.
        **variables: variables of its environment.
    """
    names = ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "XDG_DATA_HOME")
    own = {name: str(folder / name) for name in names}
    for path in own.values():
        os.makedirs(path, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NATS_")}
    manager, client = started(env={**environment, **own, **variables}, cwd=str(folder))
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        if manager.is_alive():
            manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
