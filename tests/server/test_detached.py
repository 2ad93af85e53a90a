"""The detached dev server: each user has one, all their processes find it, and never mistake another for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.scrape import free_port
from helpers.waiting import until

import nqnb
from nqnb.cli import main
from nqnb.commands import worker_commands
from nqnb.errors import DevServerError, NoServer
from nqnb.jetstream import connection
from nqnb.notebook.session import Session
from nqnb.server import detached, server_choice
from nqnb.server.detached import Condition, hold_lock, make_home
from nqnb.server.devserver import DevServer
from nqnb.server.server_choice import choose
from nqnb.settings import DEFAULT_URL

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes and locks")
PS = [shutil.which("ps") or "ps", "-eww", "-o", "pid=,args="]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a user of its own, whose server is stopped at the end."""
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = detached.home()
    assert folder.is_relative_to(tmp_path)
    yield folder
    for left in supervisors(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGTERM)
    until(lambda: not supervisors(folder))


def supervisors(folder: Path) -> list[int]:
    """Return the processes that supervise a server in that folder."""
    listed = subprocess.run(PS, capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 1) for line in listed.splitlines() if str(folder / "run") in line]
    return [int(pid) for pid, command in lines if "supervisor.py server" in command]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def running() -> detached.Detached:
    server, new = detached.start()
    assert new
    return server


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(nqnb.__file__).parents[1])}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nqnb", *arguments],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def server_file() -> Path:
    return detached.home() / "run" / "server.json"


def rewrite(**fields: object) -> None:
    file = server_file()
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **fields}))


def stopped(process: int) -> bool:
    """Return whether every thread of a process is stopped; True if the system cannot tell."""
    threads = Path(f"/proc/{process}/task").glob("*/stat")
    return all(thread.read_text().rpartition(")")[2].split()[0] in "Tt" for thread in threads)


async def count(settings: nqnb.Settings, submit: int = 0) -> int:
    async with nqnb.connect(settings) as nq:
        await nq.submit_many("kept", range(submit))
        return len(await nq.tasks())


def test_a_detached_server_outlives_the_shell_and_every_command_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(start("up", "--detach", "--json"))
    up = json.loads(out)
    assert (code, up["state"]) == (0, "running")
    assert up["url"].startswith("nats://127.0.0.1:")
    assert os.getsid(up["pid"]) not in (os.getsid(0), os.getpid())
    assert main(["submit", "kept", "1"]) == 0
    assert main(["tasks", "-v"]) == 0
    said = capsys.readouterr()
    assert "kept" in said.out
    assert f"{up['url']}: the address is that of your detached server" in said.err
    settings = detached.find()
    assert settings is not None
    assert asyncio.run(count(settings)) == 1
    assert choose().detached


def test_a_server_in_the_foreground_says_that_commands_use_the_detached_one(running: detached.Detached) -> None:
    process = start("up", "--port", "0")
    assert process.stdout is not None
    while "NATS_URL=" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, said = ended(process)
    assert code == 0
    assert f"your detached server ({running.url}) is running too" in said
    assert "unless NATS_URL" in said


def test_detaching_twice_makes_one_server(running: detached.Detached, capsys: pytest.CaptureFixture[str]) -> None:
    assert detached.start() == (running, False)
    assert main(["up", "--detach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pid"] == running.pid
    assert main(["up", "--detach", "--port", "1"]) == 0
    said = capsys.readouterr()
    assert "is already running" in said.out
    assert "first stop the server with `nqnb up --stop`" in said.err
    assert supervisors(detached.home()) == [running.keeper]


def test_a_race_makes_one_server() -> None:
    racers = [start("up", "--detach", "--json") for _ in range(4)]
    answers = [ended(each) for each in racers]
    assert [code for code, _, _ in answers] == [0, 0, 0, 0], answers
    assert len({json.loads(out)["pid"] for _, out, _ in answers}) == 1
    assert len(supervisors(detached.home())) == 1


def test_files_are_for_their_user_alone(running: detached.Detached) -> None:
    folder = detached.home()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server_file().stat().st_mode & 0o777 == 0o600
    folder.chmod(0o755)
    assert detached.find() is None, "another user could have written it"
    folder.chmod(0o700)
    assert detached.find() is not None


def test_the_token_is_needed_and_shown_nowhere(running: detached.Detached, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoServer):
        asyncio.run(count(nqnb.Settings(running.url)))
    for words in (["up", "--detach"], ["up", "--status"], ["up", "--status", "--json"], ["tasks", "-v"]):
        assert main(words) == 0
    main(["tasks", "-u", running.url])
    processes = subprocess.run(PS, capture_output=True, text=True, check=True).stdout
    log = (detached.home() / "run" / "log").read_text()
    environments = Path(f"/proc/{running.pid}/environ")
    variables = environments.read_text() if environments.exists() else ""
    said = "".join(capsys.readouterr())
    for text in (said, processes, log, variables, repr(running), repr(detached.look()), repr(choose())):
        assert running.token not in text


def test_stop_keeps_the_tasks(running: detached.Detached, capsys: pytest.CaptureFixture[str]) -> None:
    settings = detached.find()
    assert settings is not None
    asyncio.run(count(settings, submit=2))
    refused = start("up", "--stop")
    code, out, err = ended(refused)
    assert code == 1
    assert "kept" in out
    assert "2 tasks are queued or running" in err
    assert "Add --yes" in err
    assert detached.find() is not None
    assert main(["up", "--stop", "--yes"]) == 0
    assert "was stopped" in capsys.readouterr().out
    assert not server_file().exists()
    until(lambda: not supervisors(detached.home()))  # it frees its lock just before it ends
    assert main(["up", "--stop"]) == 0
    assert main(["up", "--status"]) == 1
    assert "No detached server is running" in capsys.readouterr().out
    again, _ = detached.start()
    assert again.store == running.store
    assert again.token != running.token
    found = detached.find()
    assert found is not None
    assert asyncio.run(count(found)) == 2


@pytest.mark.parametrize("variable", ["NATS_CA", "NATS_CERT", "NATS_CREDS"])
def test_stop_ignores_the_settings_of_another_server(
    running: detached.Detached, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, __file__)
    monkeypatch.setenv("NATS_KEY", str(tmp_path / "no such file"))
    code, _, err = ended(start("up", "--stop"))
    assert (code, err) == (0, "")


def test_the_port_is_kept_over_restarts(running: detached.Detached, capsys: pytest.CaptureFixture[str]) -> None:
    detached.stop()
    again, new = detached.start()
    assert (again.port, new) == (running.port, True)
    os.kill(again.pid, signal.SIGKILL)
    until(lambda: not supervisors(detached.home()))
    assert detached.start()[0].port == running.port
    detached.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", running.port))
        other.listen()
        capsys.readouterr()
        assert main(["up", "--detach", "--json"]) == 0
        moved = detached.look().server
        assert moved is not None
        assert moved.port != running.port
        detached.stop()
        (detached.home() / "port").write_text(f"{running.port}")
        assert main(["up", "--detach"]) == 0
        assert f"another program is using the previous port {running.port}" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["the same", "another"])
def test_workers_clients_and_sessions_follow_the_server_through_a_restart(
    running: detached.Detached, port: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "OUTAGE_LOG_SECONDS", 0.5)
    settings = detached.find()
    assert settings is not None
    worker = nqnb.Worker(settings)

    @worker.handler("double")
    def double(job: nqnb.Job, payload: int) -> int:
        return 2 * payload

    def said() -> list[str]:
        return [line for line in caplog.messages if "still trying" in line]

    async def restart(nq: nqnb.Client, session: Session) -> detached.Detached:
        async with nq, worker:
            assert await (await nq.submit("double", 1)).result(timeout=20) == 2
            await asyncio.to_thread(detached.stop)
            with socket.socket() as other:
                if port == "another":
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    other.bind(("127.0.0.1", running.port))
                    other.listen()
                while len(said()) < 3:
                    await asyncio.sleep(0.02)
                server, new = await asyncio.to_thread(detached.start)
                assert new
                async with nqnb.connect(settings) as late:
                    task = await late.submit("double", 2)
                assert await nq.task(task.id).result(timeout=20) == 4
                assert await (await nq.submit("double", 3)).result(timeout=20) == 6
                there = await asyncio.to_thread(lambda: nqnb.session().submit("double", 4).result(timeout=20))
                assert there == 8
                assert await asyncio.to_thread(nqnb.session) is session
        return server

    session = nqnb.session()
    try:
        server = asyncio.run(restart(nqnb.connect(settings), session))
    finally:
        session.down()
    assert (server.port == running.port) == (port == "the same")
    assert running.token not in caplog.text


def test_an_idle_server_is_stopped_without_a_question(running: detached.Detached) -> None:
    assert ended(start("up", "--stop", "--json"))[0] == 0
    assert detached.look().condition is Condition.NONE


def test_the_options_of_up_are_used(tmp_path: Path) -> None:
    port = free_port()
    assert main(["up", "--detach", "--port", str(port), "--store-dir", str(tmp_path / "s"), "--go-queue", "q"]) == 0
    server = detached.look().server
    assert server is not None
    assert (server.port, server.store) == (port, str(tmp_path / "s"))
    assert "q/cancel" in (detached.home() / "run" / "server.conf").read_text()


@linux_only
def test_a_stale_file_is_recognised_and_cleaned_up(
    running: detached.Detached, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(running.keeper, signal.SIGKILL)
    until(lambda: detached.look().condition is Condition.STALE)
    assert detached.find() is None
    assert main(["up", "--status"]) == 1
    assert "it was killed" in capsys.readouterr().out
    again, new = detached.start()
    assert new
    assert again.pid != running.pid
    os.kill(again.keeper, signal.SIGKILL)
    until(lambda: detached.look().condition is Condition.STALE)
    assert main(["up", "--stop"]) == 0
    assert detached.look().condition is Condition.NONE


def test_the_status_says_that_the_server_ended_by_itself(
    running: detached.Detached, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(running.pid, signal.SIGKILL)
    until(lambda: detached.look().condition is Condition.STALE)
    until(lambda: not supervisors(detached.home()))
    assert main(["up", "--status"]) == 1
    assert "exited with code -9" in capsys.readouterr().out
    assert detached.start()[1]


@linux_only
def test_another_server_at_its_port_is_not_joined(
    running: detached.Detached, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(running.keeper, signal.SIGKILL)
    until(lambda: detached.look().condition is Condition.STALE)
    # The server ends with its supervisor, a moment later.
    until(lambda: not listens(running.port))
    with DevServer(running.port) as stranger:
        assert detached.find() is None
        assert main(["up", "--detach", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["url"] != stranger.url
        assert stranger.running
        # The same with a lock that is held: only the identity distinguishes the servers.
        rewrite(url=stranger.url)
        found = detached.look()
        assert found.condition is Condition.SILENT
        assert "another server is listening" in found.problem
        assert main(["up", "--stop", "--yes"]) == 0
        assert stranger.running
        with pytest.raises(DevServerError, match="is using the port"):
            detached.start(running.port)


def test_a_wrong_token_is_refused(running: detached.Detached, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(token="another")
    assert detached.find() is None
    assert "refuses the token" in detached.look().problem
    with pytest.raises(DevServerError, match=r"refuses the token .*nqnb up --stop"):
        detached.start()
    code, _, err = ended(start("up", "--stop"))
    assert code == 1
    assert "may still have unfinished tasks" in err
    assert main(["up", "--stop", "--yes"]) == 0
    until(lambda: not supervisors(detached.home()))  # it frees its lock just before it ends


@linux_only
def test_no_process_is_ended_by_its_number_alone(running: detached.Detached) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        try:
            rewrite(keeper=bystander.pid, host="another")
            with pytest.raises(DevServerError, match=r"'another'.* Run `nqnb up --stop` where"):
                detached.stop()
            assert bystander.poll() is None
            rewrite(token="refused, so that only the lock says that it lives")
            assert "is running on 'another'" in detached.look().problem
        finally:
            bystander.kill()


def test_a_server_file_that_cannot_be_read_is_replaced(running: detached.Detached) -> None:
    detached.stop()
    server_file().parent.mkdir()
    server_file().write_text("{")
    assert detached.find() is None
    assert "cannot be read" in detached.look().problem
    assert detached.start()[1]


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nqnb.server.detached._access", lambda token: "nonsense: {{{")
    with pytest.raises(DevServerError, match="Parse error"):
        detached.start()
    assert detached.look().condition is Condition.NONE
    assert not server_file().parent.exists()
    monkeypatch.undo()


def test_a_named_server_is_preferred(
    running: detached.Detached, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "nats://127.0.0.1:1"
    assert not choose(url=nobody).detached
    assert not choose(token="of another server").detached
    monkeypatch.setenv("NATS_TOKEN", "of another server")
    assert choose().settings.url == "nats://127.0.0.1:4222"
    monkeypatch.delenv("NATS_TOKEN")
    assert main(["tasks", "-u", nobody]) == 3
    assert "the address is the one given" in capsys.readouterr().err
    monkeypatch.setenv("NATS_URL", nobody)
    assert main(["tasks"]) == 3
    assert "the address is that of NATS_URL" in capsys.readouterr().err
    monkeypatch.delenv("NATS_URL")
    context = Path(os.environ["XDG_CONFIG_HOME"], "nats", "context", "mine.json")
    context.parent.mkdir(parents=True)
    context.write_text(json.dumps({"url": nobody}))
    assert main(["tasks", "--context", "mine"]) == 3
    assert "that of the NATS context 'mine'" in capsys.readouterr().err
    assert choose().detached


def test_a_detached_server_that_does_not_answer_is_not_ignored(
    running: detached.Detached, capsys: pytest.CaptureFixture[str]
) -> None:
    os.kill(running.pid, signal.SIGSTOP)
    # The threads of the server stop one after another, and the last one could still answer.
    until(lambda: stopped(running.pid))
    try:
        with pytest.raises(NoServer, match=r"does not answer .*nqnb up --stop` and `nqnb up --detach`.*NATS_URL"):
            choose(connect_timeout=0.2)
        assert main(["--timeout", "0.2", "submit", "q", "1"]) == 3
        assert "`nqnb up --stop`" in capsys.readouterr().err
        assert not choose(url="nats://127.0.0.1:1").detached
    finally:
        os.kill(running.pid, signal.SIGCONT)
    assert choose().detached


def test_a_detached_server_on_another_host_is_not_ignored(running: detached.Detached) -> None:
    rewrite(token="another", host="another")
    with pytest.raises(NoServer, match=r"is running on 'another'.*NATS_URL") as caught:
        choose(connect_timeout=0.2)
    assert caught.value.url == running.url


def test_a_detached_server_that_is_starting_is_not_ignored() -> None:
    with hold_lock(make_home()) as lock:
        assert lock is not None
        assert detached.look().condition is Condition.STARTING
        with pytest.raises(NoServer, match=r"starting or stopping\. Try again in a moment"):
            choose(connect_timeout=0.2)
    assert not choose().named


def test_a_choice_waits_for_a_detached_server_that_comes_up() -> None:
    process = start("up", "--detach")
    until(lambda: detached.look().condition is not Condition.NONE)
    assert choose(connect_timeout=30).detached
    assert ended(process)[0] == 0


def test_files_of_a_dead_detached_server_lead_to_the_default(running: detached.Detached) -> None:
    os.kill(running.pid, signal.SIGKILL)
    until(lambda: detached.look().condition is Condition.STALE)
    until(lambda: not supervisors(detached.home()))
    assert not choose().named


def test_a_worker_that_names_no_server_serves_the_detached_one(running: detached.Detached, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import nqnb\nworker = nqnb.Worker()\n@worker.handler('echo')\ndef echo(job, payload):\n    return payload\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "nqnb", "worker", "mine:worker"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert main(["submit", "echo", "5", "--wait", "20"]) == 0
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert f"uses your detached server at {running.url}" in said
    assert running.token not in said


def test_a_worker_that_names_the_default_address_does_not_serve_the_detached_one(running: detached.Detached) -> None:
    assert worker_commands.worker_settings(nqnb.Settings(DEFAULT_URL), {}).urls == (DEFAULT_URL,)
    assert worker_commands.worker_settings(nqnb.Settings(), {}).urls == (running.url,)


def test_clients_and_workers_that_name_no_server_find_the_detached_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = nqnb.Worker(ack_wait=5.0)
    client = nqnb.connect(nqnb.Settings(name="mine"))

    @worker.handler("double")
    def double(job: nqnb.Job, payload: int) -> int:
        return 2 * payload

    async def use(expected: str) -> None:
        async with client, nqnb.connect() as nq, worker:
            assert await (await client.submit("double", 2)).result(timeout=20) == 4
            assert nq.settings.url == client.settings.url == worker.settings.url == expected
            assert (client.settings.name, worker.settings.ack_wait) == ("mine", 5.0)

    server, _ = detached.start()
    asyncio.run(use(server.url))
    assert server.token not in repr(client.settings)


def test_a_worker_reads_the_environment_when_it_starts(server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    worker = nqnb.Worker(concurrency=2)
    worker.handler("double")(lambda job: None)
    monkeypatch.setenv("NATS_URL", server.url)

    async def start() -> None:
        async with worker:
            assert worker.settings.url == server.url

    asyncio.run(start())


def test_an_error_about_a_missing_server_names_the_detached_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refusal() -> str:
        with pytest.raises(NoServer) as caught:
            await nqnb.connect().open()
        return str(caught.value)

    monkeypatch.setenv("NATS_URL", "nats://127.0.0.1:1")
    assert "start a server with `nqnb up --detach`" in asyncio.run(refusal())
    server, _ = detached.start()
    assert f"your detached server is running at {server.url}; to use it, do not set url" in asyncio.run(refusal())


def test_an_error_says_that_the_detached_server_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nqnb.settings.DEFAULT_URL", "nats://127.0.0.1:1")
    told = "your detached server is stopped; start it with `nqnb up --detach`"
    assert main(["queues"]) == 3
    assert told not in capsys.readouterr().err
    detached.start()
    settings = detached.find()
    assert settings is not None
    detached.stop()
    assert main(["queues"]) == 3
    assert told in capsys.readouterr().err
    for each in (None, settings):
        with pytest.raises(NoServer, match="your detached server is stopped; start it with"):
            asyncio.run(count(each or nqnb.Settings()))
    # Another server is named, so that the detached server would not be used.
    assert main(["-u", "nats://127.0.0.1:1", "queues"]) == 3
    assert told not in capsys.readouterr().err


@pytest.mark.parametrize("words", [["up", "--stop", "--port", "1"], ["up", "--status", "--go-queue", "q"]])
def test_stop_and_status_reject_options_of_a_start(words: list[str]) -> None:
    assert main(words) == 2


@pytest.mark.parametrize("source", ["argument", "environment", "context"])
def test_a_worker_that_names_a_server_never_asks_for_the_detached_one(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detached server may be silent, which must not delay the worker of another server."""

    def asked() -> None:
        raise AssertionError("the detached server was asked for")

    monkeypatch.setattr(server_choice, "look", asked)
    if source == "environment":
        monkeypatch.setenv("NATS_URL", DEFAULT_URL)
    context = Path(os.environ["XDG_CONFIG_HOME"], "nats", "context", "mine.json")
    context.parent.mkdir(parents=True)
    context.write_text(json.dumps({"url": DEFAULT_URL}))
    given = {"argument": {"url": DEFAULT_URL}, "environment": {}, "context": {"context": "mine"}}[source]
    own = nqnb.Worker(nqnb.Settings(**given), concurrency=2).settings  # type: ignore[arg-type]  # a dict of texts
    assert worker_commands.worker_settings(own, {}).urls == (DEFAULT_URL,)
