"""Real servers with authentication and TLS: valid credentials connect, and every other error has the true reason."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.certificates import Operator, new_key, write_certificates
from helpers.waiting import until_async

import nqnb
from nqnb.errors import BadInput, NoJetStream, NoResponders, NoServer, ServerRefused
from nqnb.server.cluster import Cluster

pytestmark = pytest.mark.anyio

SECRET = "s3cret"
CONNECT_TIMEOUT = 60.0
SOON = 20.0
"""Seconds in which a connection is refused, without waiting for its timeout, on a busy machine."""


@pytest.fixture(autouse=True)
def no_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    write_certificates(folder)
    return folder


def tls(files: Path, name: str = "server", *more: str) -> str:
    lines = [f'cert_file: "{files / name}.pem"', f'key_file: "{files / name}.key"', *more]
    return "tls {\n" + "\n".join(lines) + "\n}"


@pytest.fixture(scope="module")
def password_server() -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=f"authorization {{ user: ann, password: {SECRET} }}") as server:
        yield server


@pytest.fixture(scope="module")
def key() -> tuple[str, str]:
    """The seed and the public key of a user."""
    return new_key("user")


@pytest.fixture(scope="module")
def nkey_server(key: tuple[str, str]) -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=f"authorization {{ users: [{{ nkey: {key[1]} }}] }}") as server:
        yield server


@pytest.fixture(scope="module")
def operator() -> Operator:
    return Operator()


@pytest.fixture(scope="module")
def jwt_server(operator: Operator) -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=operator.config) as server:
        yield server


@pytest.fixture(scope="module")
def tls_server(files: Path) -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=tls(files)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_server(files: Path) -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=tls(files, "server", f'ca_file: "{files / "ca.pem"}"', "verify: true")) as server:
        yield server


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that the block leaves no task and no file descriptor open."""
    fds = Path("/proc/self/fd")

    def held() -> int:
        return len(list(fds.iterdir())) if fds.is_dir() else 0

    if sys.platform == "linux":
        # The loop opens sockets of its own (for its thread pool) at the first name lookup.
        await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 1)
    before, tasks = held(), asyncio.all_tasks()
    yield
    for _ in range(200):
        gc.collect()  # a socket that was not closed fails the test with its ResourceWarning
        if held() <= before and asyncio.all_tasks() <= tasks:
            return
        await asyncio.sleep(0.05)
    assert asyncio.all_tasks() <= tasks
    assert held() <= before


async def connects(url: str | list[str], **options: Any) -> None:
    async with nqnb.connect(url, connect_timeout=CONNECT_TIMEOUT, **options) as nq:
        task = await nq.submit("q", {"n": 1})
        assert await task.status() is nqnb.Status.PENDING


async def may_ask(nq: nqnb.Client) -> bool:
    """Return whether the user may publish to the subject ``unserved``."""
    try:
        await nq.backend.connection.request("unserved")
    except ServerRefused:
        return False
    except NoResponders:
        return True
    raise AssertionError("a request that nothing serves was answered")


async def is_refused(url: str | list[str], *parts: str, kind: type[Exception] = NoServer, **options: Any) -> str:
    """Check that connecting fails soon, with all these parts in one line of text, and leaves nothing behind."""
    options = {"connect_timeout": CONNECT_TIMEOUT, **options}
    async with nothing_left():
        begun = time.monotonic()
        with pytest.raises(kind) as caught:
            async with nqnb.connect(url, **options):
                pytest.fail("it is open")
        assert time.monotonic() - begun < SOON
        text = str(caught.value)
        del caught
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


class TestPasswords:
    async def test_a_valid_password_connects(
        self, password_server: nqnb.DevServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await connects(password_server.url, user="ann", password=SECRET)
        await connects(password_server.url.replace("//", f"//ann:{SECRET}@"))
        monkeypatch.setenv("NATS_USER", "ann")
        monkeypatch.setenv("NATS_PASSWORD", SECRET)
        await connects(password_server.url)

    @pytest.mark.parametrize(
        "given",
        [
            *({"user": "ann", "password": password} for password in ("wr0ng", "")),
            *({"user": "bob", "password": SECRET}, {"token": "wr0ng"}, {"user": "ann"}, {}),
        ],
    )
    async def test_a_wrong_password_is_refused_and_not_shown(
        self, password_server: nqnb.DevServer, given: dict[str, Any]
    ) -> None:
        text = await is_refused(password_server.url, "the server refused the login", password_server.url, **given)
        assert "wr0ng" not in text
        assert ("none is set" in text) == (not given)

    async def test_a_token_connects_and_a_wrong_one_is_refused(self) -> None:
        with nqnb.DevServer(config=f"authorization {{ token: {SECRET} }}") as server:
            await connects(server.url, token=SECRET)
            await connects(server.url.replace("//", f"//{SECRET}@"))
            await is_refused(server.url, "check user, password or token", token="wr0ng")
            await is_refused(server.url, "none is set")

    async def test_a_user_without_permission_for_jetstream_is_refused(self) -> None:
        deny = "permissions: { publish: { deny: '$JS.API.>' } }"
        with nqnb.DevServer(
            config=f"authorization {{ users: [{{ user: ann, password: {SECRET}, {deny} }}] }}"
        ) as server:
            await is_refused(server.url, "permissions violation", "$js.api.info", user="ann", password=SECRET)


class TestNkeys:
    async def test_a_valid_seed_connects(
        self, nkey_server: nqnb.DevServer, key: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await connects(nkey_server.url, nkey=key[0])
        path = tmp_path / "user.nk"
        for text in (
            key[0],
            f"{key[0]}\n",
            f"-----BEGIN USER NKEY SEED-----\n{key[0]}\n------END USER NKEY SEED------",
        ):
            write(path, text)
            await connects(nkey_server.url, nkey=path)
        monkeypatch.setenv("NATS_NKEY", str(path))
        await connects(nkey_server.url)

    async def test_the_file_is_read_again_at_a_reconnect(self, key: tuple[str, str], tmp_path: Path) -> None:
        path, (seed, renewed) = tmp_path / "user.nk", new_key("user")
        users = f"{{ nkey: {key[1]} }}, {{ nkey: {renewed}, permissions: {{ publish: {{ deny: unserved }} }} }}"
        write(path, key[0])
        with nqnb.DevServer(config=f"authorization {{ users: [{users}] }}") as server:
            async with nqnb.connect(server.url, nkey=path, retry_for=10) as nq:
                assert await may_ask(nq)
                write(path, "half a seed")
                server.restart()
                await nq.submit("q")
                assert await may_ask(nq)
                write(path, seed)
                server.restart()
                await nq.submit("q")
                assert not await may_ask(nq)

    async def test_an_unknown_seed_is_refused_and_not_shown(self, nkey_server: nqnb.DevServer) -> None:
        seed, _ = new_key("user")
        text = await is_refused(nkey_server.url, "the server refused the nkey", nkey=seed)
        assert seed not in text

    async def test_an_invalid_seed_is_refused_before_connecting(
        self, nkey_server: nqnb.DevServer, key: tuple[str, str], tmp_path: Path
    ) -> None:
        damaged = key[0][:30] + ("A" if key[0][30] != "A" else "B") + key[0][31:]
        text = await is_refused(nkey_server.url, "nkey is invalid: the seed is damaged", kind=BadInput, nkey=damaged)
        assert damaged[5:20] not in text
        text = await is_refused(nkey_server.url, "does not belong to a user", kind=BadInput, nkey=new_key("account")[0])
        path = tmp_path / "user.nk"
        write(path, damaged)
        text = await is_refused(nkey_server.url, "damaged", str(path), kind=BadInput, nkey=path)
        assert damaged[5:20] not in text
        write(path, "nothing")
        await is_refused(nkey_server.url, str(path), "contains no seed", kind=BadInput, nkey=path)


class TestCredentials:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "app.creds"

    async def test_a_valid_file_connects(
        self, jwt_server: nqnb.DevServer, operator: Operator, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for newline in ("\n", "\r\n"):
            write(path, operator.credentials()[0].replace("\n", newline))
            await connects(jwt_server.url, creds=path)
        monkeypatch.setenv("NATS_CREDS", str(path))
        await connects(jwt_server.url)

    async def test_the_file_is_read_again_at_a_reconnect(self, operator: Operator, path: Path) -> None:
        write(path, operator.credentials()[0])
        with nqnb.DevServer(config=operator.config) as server:
            async with nqnb.connect(server.url, creds=path, retry_for=10) as nq:
                assert await may_ask(nq)
                write(path, "half a file")
                server.restart()
                await nq.submit("q")
                assert await may_ask(nq)
                write(path, operator.credentials(deny=["unserved"])[0])
                server.restart()
                await nq.submit("q")
                assert not await may_ask(nq)

    @pytest.mark.full
    async def test_a_login_that_expires_is_replaced_by_the_renewed_file_and_no_task_is_stopped(
        self, jwt_server: nqnb.DevServer, operator: Operator, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(path, operator.credentials(expires=8)[0])
        settings = nqnb.Settings(jwt_server.url, creds=path, retry_for=10, connect_timeout=CONNECT_TIMEOUT)
        worker = nqnb.Worker(settings)
        runs, go = 0, asyncio.Event()

        @worker.handler("expiry")
        async def work(job: nqnb.Job) -> None:
            nonlocal runs
            runs += 1
            await go.wait()

        async with nqnb.connect(settings) as nq, worker:
            task = await nq.submit("expiry")
            await until_async(lambda: runs)
            write(path, operator.credentials()[0])
            assert worker._runtime is not None
            ours, theirs = nq.backend, worker._runtime.backend
            await until_async(lambda: ours.connection.losses and theirs.connection.losses, what="the login expires")
            await until_async(lambda: ours.loss_reason == theirs.loss_reason == "", what="both have reconnected")
            assert (ours.connected, theirs.connected) == (True, True)
            go.set()
            assert await task.wait(timeout=20) is nqnb.Status.COMPLETED
        assert runs == 1
        (line,) = [line for line in caplog.messages if "was lost" in line]
        assert line.endswith(
            "still trying (the credentials have expired; request new credentials; the address is correct)"
        )

    async def test_credentials_of_another_operator_or_time_are_refused(
        self, jwt_server: nqnb.DevServer, operator: Operator, path: Path
    ) -> None:
        for text, seed in (
            operator.credentials(expires=-30),
            operator.credentials(account_seed=new_key("account")[0]),
            Operator().credentials(),
        ):
            write(path, text)
            told = await is_refused(
                jwt_server.url, f"the server refused the credentials file {str(path)!r}", creds=path
            )
            assert seed not in told
        await is_refused(jwt_server.url, "none is set")

    @pytest.mark.parametrize(
        "text", ["", "nothing", "-----BEGIN NATS USER JWT-----", "-----BEGIN NATS USER JWT-----\n"]
    )
    async def test_a_file_without_credentials_is_refused(
        self, jwt_server: nqnb.DevServer, path: Path, text: str
    ) -> None:
        write(path, text)
        await is_refused(jwt_server.url, str(path), "must contain a NATS user JWT", kind=BadInput, creds=path)

    async def test_a_missing_file_is_refused(self, jwt_server: nqnb.DevServer, operator: Operator, path: Path) -> None:
        write(path, operator.credentials()[0])
        settings = nqnb.Settings(jwt_server.url, creds=path)
        os.remove(path)
        with pytest.raises(BadInput, match="cannot be read"):
            await nqnb.connect(settings).__aenter__()


class TestTLS:
    async def test_a_trusted_authority_connects(
        self, tls_server: nqnb.DevServer, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for url in (tls_server.url, tls_server.url.replace("nats:", "tls:")):
            await connects(url, tls_ca=files / "ca.pem")
        monkeypatch.setenv("NATS_CA", str(files / "ca.pem"))
        await connects(tls_server.url)

    async def test_an_untrusted_authority_is_refused(self, tls_server: nqnb.DevServer, files: Path) -> None:
        await is_refused(tls_server.url, "not signed by a trusted authority", "tls_ca")
        await is_refused(tls_server.url, "not signed by a trusted authority", tls_ca=files / "stranger.pem")

    async def test_a_connection_ends_without_a_warning(self, files: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = f"{tls(files)}\nauthorization {{ user: ann, password: {SECRET} }}"
        with nqnb.DevServer(config=config) as server:
            await is_refused(server.url, "the server refused the login", tls_ca=files / "ca.pem")
            async with nqnb.connect(server.url, tls_ca=files / "ca.pem", user="ann", password=SECRET) as nq:
                server.kill()
                while nq.backend.connected:
                    await asyncio.sleep(0.01)
        assert [record.message for record in caplog.records if record.name == "asyncio"] == []

    async def test_a_certificate_of_another_host_is_refused(self, files: Path) -> None:
        with nqnb.DevServer(config=tls(files, "elsewhere")) as server:
            await is_refused(server.url, "for another host", "127.0.0.1", tls_ca=files / "ca.pem")

    @pytest.mark.full
    async def test_tls_first_against_a_server_that_speaks_first_is_explained(
        self, tls_server: nqnb.DevServer, files: Path
    ) -> None:
        # The client's handshake may swallow the server's first message, and no other follows.
        options: dict[str, Any] = {"tls_ca": files / "ca.pem", "tls_first": True, "connect_timeout": 5.0}
        await is_refused(tls_server.url, "TLS handshake", "remove tls_first", **options)

    async def test_a_server_that_expects_the_handshake_first_needs_tls_first(
        self, tls_server: nqnb.DevServer, files: Path
    ) -> None:
        if tls_server.version.startswith("2.9."):
            pytest.skip("nats-server 2.9 has no handshake_first, so no such server of that version exists")
        with nqnb.DevServer(config=tls(files, "server", "handshake_first: true")) as server:
            await connects(server.url, tls_ca=files / "ca.pem", tls_first=True)
            parts = ("did not answer within 0.5 s", "set tls_first")
            await is_refused(server.url, *parts, tls_ca=files / "ca.pem", connect_timeout=0.5)

    async def test_a_server_without_tls_gets_no_secret(self, files: Path) -> None:
        heard = bytearray()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.12.0","auth_required":true,"nonce":"abc"}\r\n')
            heard.extend(await reader.read())
            writer.close()

        plain = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"tls://127.0.0.1:{plain.sockets[0].getsockname()[1]}"
        login: dict[str, Any] = {"user": "ann", "password": SECRET}
        with pytest.raises(NoServer, match="the server does not support TLS"):
            await nqnb.connect(url, **login).__aenter__()
        with pytest.raises(NoServer, match="the server does not support TLS"):
            await nqnb.connect(url.replace("tls:", "nats:"), tls_ca=files / "ca.pem", **login).__aenter__()
        plain.close()
        await asyncio.sleep(0.05)
        assert not heard

    async def test_optional_tls_connects_both_ways(self, files: Path) -> None:
        with nqnb.DevServer(config=f"{tls(files)}\nallow_non_tls: true") as server:
            await connects(server.url)
            await connects(server.url, tls_ca=files / "ca.pem")
            await is_refused(server.url, "not signed by a trusted authority", tls_ca=files / "stranger.pem")

    async def test_invalid_files_are_refused(self, tls_server: nqnb.DevServer, files: Path, tmp_path: Path) -> None:
        text = tmp_path / "notes.txt"
        write(text, "nothing")
        await is_refused(tls_server.url, "tls_ca", str(text), "PEM", kind=BadInput, tls_ca=text)
        for pair in ((text, files / "client.key"), (files / "client.pem", files / "intruder.key")):
            ours: dict[str, Any] = {"tls_cert": pair[0], "tls_key": pair[1]}
            await is_refused(tls_server.url, *map(str, pair), kind=BadInput, tls_ca=files / "ca.pem", **ours)


class TestMutualTLS:
    def ours(self, files: Path, name: str) -> dict[str, Any]:
        return {"tls_ca": files / "ca.pem", "tls_cert": files / f"{name}.pem", "tls_key": files / f"{name}.key"}

    async def test_a_valid_client_certificate_connects(
        self, mutual_server: nqnb.DevServer, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await connects(mutual_server.url, **self.ours(files, "client"))
        for variable, name in (("NATS_CA", "ca.pem"), ("NATS_CERT", "client.pem"), ("NATS_KEY", "client.key")):
            monkeypatch.setenv(variable, str(files / name))
        await connects(mutual_server.url)

    async def test_a_missing_client_certificate_is_explained(self, mutual_server: nqnb.DevServer, files: Path) -> None:
        await is_refused(
            mutual_server.url, "the server requires a client certificate", "tls_cert", tls_ca=files / "ca.pem"
        )

    async def test_an_untrusted_client_certificate_is_refused(self, mutual_server: nqnb.DevServer, files: Path) -> None:
        await is_refused(mutual_server.url, "the server refused the client certificate", **self.ours(files, "intruder"))

    async def test_renewed_files_are_read_again_at_a_reconnect(self, tmp_path: Path) -> None:
        write_certificates(tmp_path)
        verify = (f'ca_file: "{tmp_path / "ca.pem"}"', "verify: true")
        with nqnb.DevServer(config=tls(tmp_path, "server", *verify)) as server:
            async with nqnb.connect(server.url, retry_for=10, **self.ours(tmp_path, "client")) as nq:
                await nq.submit("q")
                server.kill()
                write_certificates(tmp_path)  # of another authority
                server.restart()
                await nq.submit("q")
                server.kill()
                write(tmp_path / "client.pem", "half a file")
                server.restart()
                await nq.submit("q")

    async def test_a_reconnect_without_a_valid_certificate_is_explained(self, files: Path, tmp_path: Path) -> None:
        for name in ("client.pem", "client.key"):
            write(tmp_path / name, (files / name).read_text())
        login = {**self.ours(tmp_path, "client"), "tls_ca": files / "ca.pem"}
        verify = (f'ca_file: "{files / "ca.pem"}"', "verify: true")
        with nqnb.DevServer(config=tls(files, "server", *verify)) as server:
            async with nqnb.connect(server.url, **login) as nq:
                server.kill()
                await until_async(lambda: nq.backend.loss_reason == "the connection was refused")
                assert nq.backend.refusal == ""
                for suffix in ("pem", "key"):
                    write(tmp_path / f"client.{suffix}", (files / f"intruder.{suffix}").read_text())
                server.restart()
                await until_async(lambda: "the server refused the client certificate" in nq.backend.refusal)

    async def test_a_client_certificate_can_replace_a_login(self, files: Path) -> None:
        verify = (f'ca_file: "{files / "ca.pem"}"', "verify_and_map: true")
        users = 'authorization { users: [{ user: "ann@example.com" }] }'
        with nqnb.DevServer(config=f"{tls(files, 'server', *verify)}\n{users}") as server:
            await connects(server.url, **self.ours(files, "client"))


class TestAddresses:
    @pytest.fixture
    def mute(self) -> Iterator[str]:
        """A host that accepts connections and sends nothing."""
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            yield f"nats://127.0.0.1:{mute.getsockname()[1]}"

    async def test_a_dead_address_is_refused(self) -> None:
        await is_refused("nats://127.0.0.1:1", "the connection was refused", "`nqnb up --detach`")
        await is_refused("nats://no-such-host.invalid", "the host name is unknown")

    async def test_a_silent_address_times_out(self, mute: str) -> None:
        await is_refused(mute, "did not answer within 0.3 s", connect_timeout=0.3)
        await is_refused(mute, "did not answer within 0.3 s", connect_timeout=0.3, tls_first=True)

    async def test_a_server_that_closes_the_connection_is_explained(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576}\r\n')
            await reader.readline()
            writer.close()

        there = await asyncio.start_server(serve, "127.0.0.1", 0)
        with pytest.raises(NoServer, match="the server closed the connection"):
            await nqnb.connect(f"127.0.0.1:{there.sockets[0].getsockname()[1]}").__aenter__()
        there.close()

    async def test_a_server_without_jetstream_is_refused(self) -> None:
        with nqnb.DevServer(jetstream=False) as server:
            await is_refused(server.url, server.url, "JetStream is not enabled", kind=NoJetStream)

    # The addresses are tried in a random order.
    @pytest.mark.full
    @pytest.mark.parametrize("_", range(4))
    async def test_a_live_address_among_dead_ones_connects(self, _: int, server: nqnb.DevServer, mute: str) -> None:
        await connects(["nats://127.0.0.1:1", "nats://no-such-host.invalid", mute, server.url])

    async def test_an_accepting_address_among_refusing_ones_connects(self, files: Path) -> None:
        login: dict[str, Any] = {"user": "ann", "password": SECRET, "tls_ca": files / "ca.pem"}
        config = f"authorization {{ user: ann, password: {SECRET} }}\n"
        with (
            nqnb.DevServer(config=config + tls(files)) as right,
            nqnb.DevServer(config=tls(files, "elsewhere")) as other,
        ):
            for _ in range(4):
                await connects([other.url, right.url], **login)
            await is_refused(
                [other.url, "127.0.0.1:1"],
                f"{other.url}: the server's certificate",
                "127.0.0.1:1: the connection",
                **login,
            )

    @pytest.mark.full
    async def test_the_address_of_a_server_that_has_left_the_cluster_is_forgotten(self) -> None:
        async with Cluster(3) as cluster:
            first, second, third = (url.removeprefix("nats://") for url in cluster.urls)

            async with nqnb.connect(first) as nq:
                client = nq.backend.connection.client

                def others() -> set[str]:
                    return {url.netloc for url in client.discovered_servers}

                await until_async(lambda: others() == {second, third})
                await asyncio.to_thread(cluster.kill, 2)
                await until_async(lambda: others() == {second})
                await asyncio.to_thread(cluster.kill, 0)
                await until_async(lambda: nq.backend.connected and nq.backend.connection.losses)
                # The address from the settings is kept, although its server is down.
                assert {url.netloc for url in client.servers} == {first, second}

    @pytest.mark.full
    async def test_a_server_that_returns_to_a_cluster_is_checked_for_the_host_name_of_the_settings(
        self, files: Path
    ) -> None:
        # The servers list their addresses, which their certificates do not contain.
        async with Cluster(3, config=tls(files, "named") + "\nallow_non_tls: true") as cluster:
            ports = [int(url.rpartition(":")[2]) for url in cluster.urls]
            async with nqnb.connect(f"tls://localhost:{ports[0]}", tls_ca=files / "ca.pem") as nq:
                connection = nq.backend.connection
                client = connection.client

                def listed() -> set[int | None]:
                    return {url.port for url in client.discovered_servers}

                def connected() -> int:
                    url = client.connected_url
                    return 0 if not connection.connected or url is None or url.port is None else url.port

                await until_async(lambda: listed() >= set(ports[1:]))
                await asyncio.to_thread(cluster.kill, 0)
                await until_async(lambda: connected() in ports[1:])
                current = ports.index(connected())
                other = 3 - current
                await asyncio.to_thread(cluster.kill, other)
                await until_async(lambda: ports[other] not in listed())
                await asyncio.to_thread(cluster.restart, other)
                await until_async(lambda: ports[other] in listed())
                await asyncio.to_thread(cluster.kill, current)
                await until_async(lambda: connected() == ports[other])

    async def test_a_reconnect_tries_the_other_addresses(self, server: nqnb.DevServer) -> None:
        async with nqnb.connect(["nats://127.0.0.1:1", server.url], retry_for=10) as nq:
            server.restart()
            await nq.submit("q")


class TestSecrets:
    async def test_no_secret_is_shown_anywhere(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        told = []
        with nqnb.DevServer(config="authorization { user: ann, password: other }") as server:
            secret_url = server.url.replace("//", f"//ann:{SECRET}@")
            for given in (
                {"url": secret_url},
                {"url": [secret_url, secret_url.replace("ann", "bob")]},
                {"url": server.url, "user": "ann", "password": SECRET},
                {"url": server.url, "token": SECRET},
            ):
                settings = nqnb.Settings(**given)
                client = nqnb.connect(settings)
                with pytest.raises(NoServer) as caught:
                    await client.__aenter__()
                chain: BaseException | None = caught.value
                while chain is not None:
                    told.append(f"{chain!r} {chain} {vars(chain)}")
                    chain = chain.__cause__ or chain.__context__
                told.append(f"{settings!r} {settings} {client!r}")
        assert SECRET not in "".join(told) + caplog.text

    async def test_a_secret_that_a_server_repeats_is_removed(self) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.12.0","auth_required":true}\r\n')
            await reader.readline()
            writer.write(f"-ERR 'this server does not know {SECRET}'\r\n".encode())
            await reader.read()
            writer.close()

        there = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{there.sockets[0].getsockname()[1]}"
        text = await is_refused(url, "this server does not know …", token=SECRET)
        assert SECRET not in text
        there.close()


async def test_buckets_of_another_name(server: nqnb.DevServer) -> None:
    mine: dict[str, Any] = {
        name: f"mine-{name}" for name in ("state_bucket", "cancel_bucket", "worker_bucket", "result_bucket")
    }
    async with nqnb.connect(server.url, **mine) as nq:
        await nq.submit("q")
        streams = await nq.backend.connection.api("STREAM.NAMES")
        assert {name for name in streams["streams"] if name.startswith("KV_")} == {
            f"KV_{name}" for name in mine.values()
        }
