"""Delivers what widgets send while a cell waits, in kernels that would keep it until the cell ends.

Before version 7, ipykernel handles one message of its shell channel after the other, and a cell is one of them: a
button that is pressed meanwhile stays in its queue. So while one of nqnb's own waits holds the main thread, what
widgets have sent is taken out of that queue, and handled there and then. All else stays in it, in its order, and the
kernel goes on with that after the cell.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import signal
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from nqnb.notebook.loop import LOOP

_log = logging.getLogger(__name__)

_OF_WIDGETS = frozenset({"comm_open", "comm_msg", "comm_close", "comm_info_request"})
_POLLIN, _POLLOUT = 1, 2
"""Those of ZeroMQ."""


def begin() -> None:
    """Pump during the waits of this process, where it is a kernel that needs it; twice is as once."""
    kernel = _kernel()
    if kernel is not None:
        LOOP.meanwhile = Pump(kernel)


def end() -> None:
    """Leave the waits of this process alone again."""
    LOOP.meanwhile = None


def needed(version: str) -> bool:
    """Whether a version of ipykernel keeps what widgets send until the cell ends."""
    return version.partition(".")[0] == "6"


class Pump:
    """Each call handles what widgets have sent since the last one, on the main thread of a kernel.

    It does what the kernel's own dispatching does with a message, which itself cannot be used here: in some versions
    it awaits what comes by the loop that is blocked now, and it would take the interrupt's handler from the cell.

    Args:
        kernel: of ipykernel 6.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._pumping = False
        self._broken = False

    def __call__(self) -> None:
        """Handle what is there. Nothing happens inside of what a widget's message has set off, nor outside of a cell.

        A handler that waits for nqnb is thereby not entered once more meanwhile, as it never is without a pump.
        """
        if self._pumping or self._broken:
            return
        self._pumping = True
        sent: deque[Any] = deque()
        try:
            if not self._in_a_cell():
                return
            with _uninterrupted():
                self._take(sent)
            while sent:
                self._handle(sent.popleft()[2][0])
        except Exception:  # noqa: BLE001  what a kernel of another make lacks is no reason for the wait to fail
            self._broken = True
            _log.warning("buttons wait for the end of the cell, as this kernel cannot be pumped", exc_info=True)
        finally:
            self._pumping = False
            for each in sent:  # interrupted: they come after the cell
                self._kernel.msg_queue.put_nowait(each)

    def _in_a_cell(self) -> bool:
        header = self._kernel.get_parent("shell").get("header", {})
        return bool(header.get("msg_type") == "execute_request")

    def _take(self, sent: deque[Any]) -> None:
        """Move what widgets have sent out of the kernel's queue; an interrupt meanwhile would lose other messages."""
        self._kernel.shell_stream.flush(_POLLIN)
        queue = self._kernel.msg_queue
        rest: list[Any] = []
        while not queue.empty():
            entry = queue.get_nowait()
            (sent if self._is_of_a_widget(entry) else rest).append(entry)
        for each in rest:
            queue.put_nowait(each)

    def _is_of_a_widget(self, entry: tuple[int, Any, tuple[Any, ...]]) -> bool:
        _, dispatch, arguments = entry
        if dispatch != self._kernel.dispatch_shell:
            return False
        session = self._kernel.session
        try:
            # Only a look: its signature can be checked once, and that is for whoever handles it.
            _, frames = session.feed_identities(arguments[0], copy=False)
            return session.unpack(frames[1].bytes)["msg_type"] in _OF_WIDGETS
        except Exception:  # noqa: BLE001  the kernel has its own words for what cannot be read
            return False

    def _handle(self, frames: Any) -> None:
        kernel = self._kernel
        idents, frames = kernel.session.feed_identities(frames, copy=False)
        try:
            message = kernel.session.deserialize(frames, content=True, copy=False)
        except Exception:
            kernel.log.exception("Invalid Message")
            return
        of_cell = kernel._parent_ident["shell"], kernel.get_parent("shell")
        _flush()
        try:
            kernel.set_parent(idents, message, channel="shell")
            kernel._publish_status("busy", "shell", message)
            self._run(kernel.shell_handlers[message["header"]["msg_type"]], idents, message)
        finally:
            with _uninterrupted():
                # What it printed is its own, what comes next is the cell's.
                _flush()
                kernel._publish_status("idle", "shell", message)
                kernel.set_parent(*of_cell, channel="shell")
                # Front ends take the last status for the kernel's.
                kernel._publish_status("busy", "shell", of_cell[1])
                kernel.shell_stream.flush(_POLLOUT)

    def _run(self, handler: Any, idents: Any, message: Any) -> None:
        try:
            answer = handler(self._kernel.shell_stream, idents, message)
            if inspect.iscoroutine(answer):
                _step(answer)
        except Exception:
            self._kernel.log.exception("Exception in message handler:")


def _step(coroutine: Any) -> None:
    """Run a coroutine that awaits nothing, as that of ``comm_info_request``: the loop is blocked."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("it waits for the kernel's loop, which waits for a cell")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the end of the block."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _kernel() -> Any:
    """The kernel that this process is, where it needs a pump."""
    if not needed(getattr(sys.modules.get("ipykernel"), "__version__", "")):
        return None
    shell = sys.modules["IPython"].get_ipython()
    kernel = getattr(shell, "kernel", None)
    # One inside of another program has no channels.
    return None if getattr(kernel, "shell_stream", None) is None else kernel
