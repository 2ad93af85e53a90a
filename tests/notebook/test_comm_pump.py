"""Messages of widgets while a cell waits, in ipykernel 6: they are handled at once, and all others are unchanged."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers.kernels import PATIENCE, Kernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from jupyter_client.session import Session
from tornado.queues import Queue

from nqnb.notebook import comm_pump
from nqnb.notebook.loop import LOOP, Loop

TREE = Path(__file__).parents[2]


class Channel:
    """A shell channel: messages stay in it until they are flushed into the kernel's queue."""

    def __init__(self, arrive: Callable[[Any], None]) -> None:
        self.arrive = arrive
        self.sent: list[Any] = []

    def flush(self, flag: int) -> None:
        while flag & zmq.POLLIN and self.sent:
            self.arrive(self.sent.pop(0))


class SmallKernel:
    """The part of an ipykernel 6 kernel that handles messages, with real sessions and messages."""

    def __init__(self) -> None:
        self.session = Session(key=b"secret")
        self.page = Session(key=b"secret")
        self.log = logging.getLogger("small")
        self.msg_queue: Queue[Any] = Queue()
        self.shell_stream = Channel(lambda frames: self.msg_queue.put_nowait((0, self.dispatch_shell, (frames,))))
        self.shell_handlers: dict[str, Any] = {"comm_msg": self.comm_msg, "comm_info_request": self.comm_info_request}
        self.on_message: Callable[[Any], None] = lambda data: None
        self.seen: list[str] = []
        self._parents: dict[str, Any] = {"shell": {}}
        self._parent_ident: dict[str, Any] = {"shell": b""}

    def send(self, kind: str, data: Any = None) -> Any:
        message = self.page.msg(kind, {"data": data})
        self.shell_stream.sent.append([zmq.Frame(each) for each in self.page.serialize(message, b"page")])
        return message

    def run_a_cell(self) -> None:
        self.set_parent([b"page"], self.page.msg("execute_request", {"data": "the cell"}), "shell")

    def left(self) -> list[Any]:
        """Return the data of the messages that are left for the kernel, in order."""
        found = []
        while not self.msg_queue.empty():
            _, dispatch, arguments = self.msg_queue.get_nowait()
            if dispatch == self.dispatch_shell:
                _, frames = self.session.feed_identities(arguments[0], copy=False)
                found.append(self.session.deserialize(frames, copy=False)["content"]["data"])
            else:
                found.append(dispatch)
        return found

    def get_parent(self, channel: str) -> Any:
        return self._parents[channel]

    def set_parent(self, ident: Any, parent: Any, channel: str) -> None:
        self._parent_ident[channel], self._parents[channel] = ident, parent

    def _publish_status(self, status: str, channel: str, parent: Any) -> None:
        self.seen.append(f"{status} {parent['content']['data']}")

    def dispatch_shell(self, frames: Any) -> None:
        raise AssertionError("its loop is blocked")

    def comm_msg(self, stream: Channel, ident: Any, message: Any) -> None:
        assert ident == [b"page"]
        assert self.get_parent("shell") is message
        self.seen.append(f"handled {message['content']['data']}")
        self.on_message(message["content"]["data"])

    async def comm_info_request(self, stream: Channel, ident: Any, message: Any) -> None:
        self.seen.append("told")


@pytest.fixture
def kernel() -> SmallKernel:
    made = SmallKernel()
    made.run_a_cell()
    return made


def interrupt() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def test_messages_of_widgets_are_handled_and_the_others_keep_their_order(kernel: SmallKernel) -> None:
    of_an_event_loop = (0, print, ())
    kernel.send("execute_request", "one")
    kernel.send("comm_msg", "press")
    kernel.shell_stream.flush(zmq.POLLIN)
    kernel.msg_queue.put_nowait(of_an_event_loop)
    kernel.send("comm_info_request", "info")
    kernel.send("inspect_request", "two")
    kernel.send("execute_request", "three")
    kernel.send("comm_msg", "press again")
    comm_pump.Pump(kernel)()
    handled = [each for each in kernel.seen if each.startswith(("handled", "told"))]
    assert handled == ["handled press", "told", "handled press again"]
    assert kernel.left() == ["one", print, "two", "three"]


def test_each_message_is_busy_and_idle_and_then_the_cell_is_busy_again(kernel: SmallKernel) -> None:
    cell = kernel.get_parent("shell")
    kernel.send("comm_msg", "press")
    comm_pump.Pump(kernel)()
    assert kernel.seen == ["busy press", "handled press", "idle press", "busy the cell"]
    assert kernel.get_parent("shell") is cell


def test_the_pump_is_not_entered_again_from_a_message_handler(kernel: SmallKernel) -> None:
    made = comm_pump.Pump(kernel)
    kernel.on_message = lambda data: made()
    kernel.send("comm_msg", 1)
    kernel.send("comm_msg", 2)
    made()
    assert kernel.seen == ["busy 1", "handled 1", "idle 1", "busy the cell", "busy 2", "handled 2", "idle 2",
                           "busy the cell"]  # fmt: skip


def test_outside_of_a_cell_the_kernel_handles_all_messages(kernel: SmallKernel) -> None:
    kernel.set_parent([b"page"], kernel.page.msg("comm_msg"), "shell")
    kernel.send("comm_msg", "press")
    comm_pump.Pump(kernel)()
    assert kernel.seen == []
    assert len(kernel.shell_stream.sent) == 1


def test_after_an_interrupted_message_handler_the_kernel_handles_the_rest(kernel: SmallKernel) -> None:
    cell = kernel.get_parent("shell")
    kernel.on_message = lambda data: interrupt()
    kernel.send("execute_request", "later")
    kernel.send("comm_msg", "press")
    kernel.send("comm_msg", "press again")
    with pytest.raises(KeyboardInterrupt):
        comm_pump.Pump(kernel)()
    assert kernel.seen == ["busy press", "handled press", "idle press", "busy the cell"]
    assert kernel.get_parent("shell") is cell
    assert kernel.left() == ["later", "press again"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_during_the_look_loses_no_message(kernel: SmallKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        kernel.send("execute_request", n)
    arrive = kernel.shell_stream.arrive

    def interrupted(frames: Any) -> None:
        interrupt()
        arrive(frames)

    monkeypatch.setattr(kernel.shell_stream, "arrive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comm_pump.Pump(kernel)()
    assert kernel.left() == [0, 1, 2]


def test_an_error_in_a_message_handler_is_logged(kernel: SmallKernel, caplog: pytest.LogCaptureFixture) -> None:
    def fail(data: Any) -> None:
        raise ValueError(data)

    kernel.on_message = fail
    kernel.send("comm_msg", 1)
    kernel.send("comm_msg", 2)
    comm_pump.Pump(kernel)()
    assert [record.getMessage() for record in caplog.records] == ["Exception in message handler:"] * 2
    assert kernel.seen[-1] == "busy the cell"


def test_a_message_with_a_wrong_signature_is_not_handled(kernel: SmallKernel) -> None:
    kernel.page = Session(key=b"guessed")
    kernel.send("comm_msg", "press")
    comm_pump.Pump(kernel)()
    assert kernel.seen == []


def test_a_different_kernel_is_left_unchanged(
    monkeypatch: pytest.MonkeyPatch, kernel: SmallKernel, caplog: pytest.LogCaptureFixture
) -> None:
    del kernel.msg_queue
    monkeypatch.setattr(LOOP, "meanwhile", comm_pump.Pump(kernel))
    try:
        assert LOOP.call(asyncio.sleep(0.2, "done")) == "done"
    finally:
        LOOP.stop()
    assert caplog.text.count("buttons take effect only after the cell") == 1


@pytest.mark.parametrize(
    ("version", "needed"), [("", False), ("6.29.5", True), ("6.31.0", True), ("7.0.0", False), ("7.4.0", False)]
)
def test_ipykernel_6_needs_the_pump(version: str, needed: bool) -> None:
    assert comm_pump.needed(version) is needed


def test_without_a_kernel_waits_are_unchanged() -> None:
    comm_pump.begin()
    assert LOOP.meanwhile is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_does_not_pump_the_kernel_of_its_parent() -> None:
    loop = Loop()
    loop.meanwhile = print
    loop.reset()
    assert loop.meanwhile is None


WAITS = """
import asyncio
from nqnb.notebook import comm_pump
from nqnb.notebook.loop import LOOP
comm_pump.begin()
presses = asyncio.Queue()

def opened(comm, message):
    comm.on_msg(lambda message: (print("of the page"), LOOP.soon(presses.put_nowait, 1)))

get_ipython().kernel.comm_manager.register_target("buttons", opened)
"""


@pytest.fixture(params=["6.29.*", "6.30.*", "6.31.*"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kernel]:
    """Start a kernel of an older ipykernel, in its own environment."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = [str(TREE), f"ipykernel=={request.param}"]
    subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "", "language": ""}))
    manager = KernelManager(
        kernel_name="old",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(tmp_path)], ensure_native_kernel=False),
    )
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def send(cells: Kernel, kind: str, **content: Any) -> str:
    """Send a message for a widget as a page does, and return its id."""
    message = cells.client.session.msg(kind, content)
    cells.client.shell_channel.send(message)
    return str(message["header"]["msg_id"])


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform == "win32", reason="an environment's Python lies elsewhere there")
def test_buttons_work_during_a_wait_in_ipykernel_6(old: Kernel) -> None:
    old.run(WAITS)
    waiting = old.start("print('before')\nLOOP.call(presses.get())\nprint('after')")
    old.until(waiting, "before")
    later = [old.start(f"print({n})") for n in range(3)]
    send(old, "comm_open", comm_id="a", target_name="buttons", data={})
    pressed = send(old, "comm_msg", comm_id="a", data={})
    told: set[str] = set()
    text: dict[str, str] = {}
    order: list[str] = []
    while later[-1] not in told:
        message = old.client.get_iopub_msg(timeout=PATIENCE)
        parent, content = message["parent_header"].get("msg_id", ""), message["content"]
        if message["msg_type"] == "stream":
            text[parent] = text.get(parent, "") + content["text"]
            order.append(parent)
        elif content.get("execution_state") == "idle":
            told.add(parent)
    assert order == [pressed, waiting, *later]
    assert text == {pressed: "of the page\n", waiting: "after\n", **{each: f"{n}\n" for n, each in enumerate(later)}}

    waiting = old.start("print('before')\nLOOP.call(presses.get())")
    old.until(waiting, "before")
    old.interrupt()
    assert old.end(waiting).error.startswith("KeyboardInterrupt")
    assert old.run("1 + 1").text == "2\n"
