"""Handle widget messages while a cell waits, in kernels that would otherwise queue these messages.

Versions of ipykernel before 7 handle the messages of the shell channel one at a time, and the request to run a cell is
one of these messages. A button click therefore stays in the queue until the cell has finished. While an nqnb call
blocks the main thread, the pump removes widget messages from the queue and handles them immediately. The kernel handles
all other messages in their original order after the cell.
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

_WIDGET_MESSAGES = frozenset({"comm_open", "comm_msg", "comm_close", "comm_info_request"})
_POLLIN, _POLLOUT = 1, 2
"""The ZeroMQ event flags."""


def begin() -> None:
    """Enable the pump if this process is a kernel that needs a pump. This function is idempotent."""
    kernel = _kernel()
    if kernel is not None:
        LOOP.meanwhile = Pump(kernel)


def end() -> None:
    """Disable the pump."""
    LOOP.meanwhile = None


def needed(version: str) -> bool:
    """Return whether a version of ipykernel queues widget messages until the cell has finished."""
    return version.partition(".")[0] == "6"


class Pump:
    """A callable that handles the queued widget messages on the main thread of a kernel.

    The pump handles a message in the same way as the kernel's own dispatcher. The pump cannot call the dispatcher,
    which may await the blocked event loop and would replace the cell's interrupt handler.

    Args:
        kernel: a kernel from ipykernel 6.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._pumping = False
        self._broken = False

    def __call__(self) -> None:
        """Handle the queued widget messages.

        Outside a cell, or inside a widget's message handler, do nothing. A message handler that waits for an nqnb call
        is therefore never reentered.
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
        except Exception:  # noqa: BLE001  an unexpected kind of kernel must not make the wait fail
            self._broken = True
            _log.warning(
                "buttons take effect only after the cell has finished: nqnb cannot read this kernel's messages",
                exc_info=True,
            )
        finally:
            self._pumping = False
            for entry in sent:  # interrupted: the kernel handles these after the cell
                self._kernel.msg_queue.put_nowait(entry)

    def _in_a_cell(self) -> bool:
        header = self._kernel.get_parent("shell").get("header", {})
        return bool(header.get("msg_type") == "execute_request")

    def _take(self, sent: deque[Any]) -> None:
        """Move widget messages from the kernel's queue to ``sent``.

        The caller must delay interrupts, because an interrupt during this call would lose messages.
        """
        self._kernel.shell_stream.flush(_POLLIN)
        queue = self._kernel.msg_queue
        rest: list[Any] = []
        while not queue.empty():
            entry = queue.get_nowait()
            (sent if self._is_from_widget(entry) else rest).append(entry)
        for entry in rest:
            queue.put_nowait(entry)

    def _is_from_widget(self, entry: tuple[int, Any, tuple[Any, ...]]) -> bool:
        _, dispatch, arguments = entry
        if dispatch != self._kernel.dispatch_shell:
            return False
        session = self._kernel.session
        try:
            # Read only the type. The signature, which can be checked only once, is checked by `_handle`.
            _, frames = session.feed_identities(arguments[0], copy=False)
            return session.unpack(frames[1].bytes)["msg_type"] in _WIDGET_MESSAGES
        except Exception:  # noqa: BLE001  the kernel itself reports unreadable messages
            return False

    def _handle(self, frames: Any) -> None:
        kernel = self._kernel
        idents, frames = kernel.session.feed_identities(frames, copy=False)
        try:
            message = kernel.session.deserialize(frames, content=True, copy=False)
        except Exception:
            kernel.log.exception("Invalid Message")
            return
        cell_parent = kernel._parent_ident["shell"], kernel.get_parent("shell")
        _flush()
        try:
            kernel.set_parent(idents, message, channel="shell")
            kernel._publish_status("busy", "shell", message)
            self._run(kernel.shell_handlers[message["header"]["msg_type"]], idents, message)
        finally:
            with _uninterrupted():
                # Output up to here belongs to the message; later output belongs to the cell.
                _flush()
                kernel._publish_status("idle", "shell", message)
                kernel.set_parent(*cell_parent, channel="shell")
                # Front ends show the last status that they receive as the status of the kernel.
                kernel._publish_status("busy", "shell", cell_parent[1])
                kernel.shell_stream.flush(_POLLOUT)

    def _run(self, handler: Any, idents: Any, message: Any) -> None:
        try:
            answer = handler(self._kernel.shell_stream, idents, message)
            if inspect.iscoroutine(answer):
                _step(answer)
        except Exception:
            self._kernel.log.exception("Exception in message handler:")


def _step(coroutine: Any) -> None:
    """Run a coroutine without the event loop, which is blocked. The coroutine must not suspend."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError(
        "cannot run this message handler now: it needs the kernel's event loop, which a running cell is blocking. "
        "Wait until the cell has finished."
    )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay interrupts until the end of the ``with`` block."""
    interrupts = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _kernel() -> Any:
    """Return the kernel of this process if the kernel needs a pump, or None."""
    if not needed(getattr(sys.modules.get("ipykernel"), "__version__", "")):
        return None
    shell = sys.modules["IPython"].get_ipython()
    kernel = getattr(shell, "kernel", None)
    # A kernel that is embedded in another program may have no channels.
    return None if getattr(kernel, "shell_stream", None) is None else kernel
