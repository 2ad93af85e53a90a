"""The permissions of docs/permissions.md are enough for a client and a worker, and none of them can be left out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.scrape import exporting, scrape
from helpers.waiting import until_async

import nqnb
from nqnb import Status
from nqnb.cli import main
from nqnb.errors import NoServer, ServerRefused, TaskExists
from nqnb.jetstream.connection import Connection
from nqnb.jetstream.queue_streams import can_pause
from nqnb.jetstream.schedules import can_schedule
from nqnb.protocol.heartbeat import WATCH_AFTER_SECONDS
from nqnb.protocol.lifecycle import LONG_WAIT_SECONDS
from nqnb.protocol.wire import CancelMessage

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).parents[2] / "docs" / "permissions.md").read_text(encoding="utf-8")
(CONFIG,) = re.findall(r"```conf\n(# permissions .*?)```", PAGE, re.DOTALL)
QUEUE = "resize"
OPERATOR, CLIENT, WORKER = "operator", "client", "worker"
PASSWORD = "secret"
LOGGER = "nqnb.connection"


def allowed(user: str, verb: str) -> list[str]:
    """Return the subjects that docs/permissions.md allows a user."""
    (block,) = re.findall(rf"^{user} = \{{\n(.*?)^\}}", CONFIG, re.DOTALL | re.MULTILINE)
    (subjects,) = re.findall(rf"{verb}: \[(.*?)\]", block, re.DOTALL)
    return re.findall(r'"([^"]+)"', subjects)


def covers(pattern: str, subject: str) -> bool:
    tokens, words = pattern.split("."), subject.split(".")
    if tokens[-1] == ">" and len(words) >= len(tokens):
        tokens, words = tokens[:-1], words[: len(tokens) - 1]
    return len(tokens) == len(words) and all(token in ("*", word) for token, word in zip(tokens, words, strict=True))


def without(*subjects: str) -> str:
    """Return the configuration of docs/permissions.md without some subjects."""
    config: str = CONFIG
    for subject in subjects:
        assert f'"{subject}"' in config
        config = config.replace(f'"{subject}"', '"nothing"')
    return config


def users(server: nqnb.DevServer) -> dict[str, nqnb.Settings]:
    """Return the settings of each user."""
    return {
        user: nqnb.Settings(server.url, user=user, password=PASSWORD, ack_wait=1.0)
        for user in (OPERATOR, CLIENT, WORKER)
    }


@pytest.fixture
def server() -> Iterator[nqnb.DevServer]:
    with nqnb.DevServer(config=CONFIG) as server:
        yield server


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], set[str]]:
    """Record the subjects that users publish and subscribe to, by user and verb."""
    subjects: dict[tuple[str, str], set[str]] = defaultdict(set)

    def note(method: str, verb: str) -> None:
        original: Callable[..., Any] = getattr(Connection, method)

        def noting(self: Connection, subject: str, *rest: Any, **options: Any) -> Any:
            subjects[str(self.settings.user), verb].add(subject)
            return original(self, subject, *rest, **options)

        monkeypatch.setattr(Connection, method, noting)

    note("ask", "publish")
    note("put", "publish")
    note("subscribe", "subscribe")
    return subjects


async def prepare(settings: nqnb.Settings) -> None:
    """Do what docs/permissions.md asks an operator to do first."""
    async with nqnb.connect(settings) as nq:
        await (await nq.submit(QUEUE, process_at=timedelta(hours=1))).cancel()


def make_worker(settings: nqnb.Settings) -> nqnb.Worker:
    worker = nqnb.Worker(settings, concurrency=4)

    @worker.handler(QUEUE, backoff=nqnb.Backoff(2 * LONG_WAIT_SECONDS, 2 * LONG_WAIT_SECONDS))
    async def resize(job: nqnb.Job, what: str) -> str:
        job.progress(1, 2, "half")
        if what == "fails":
            raise ValueError("as told")
        if what == "tells":
            print("resizing")
        if what == "lasts":
            await asyncio.sleep(60)
        return "x" * 10_000 if what == "large" else what

    return worker


async def reaches(task: nqnb.Task, status: Status, attempt: int = 1) -> None:
    async def reached() -> bool:
        info = await task.fetch()
        return (info.status, info.attempt) == (status, attempt)

    await until_async(reached)


async def work(nq: nqnb.Client, operator: nqnb.Client) -> None:
    """Do everything that a client does, while a worker runs."""
    assert await (await nq.submit(QUEUE, "small")).result(30) == "small"
    assert len(await (await nq.submit(QUEUE, "large")).result(30)) == 10_000
    for task in await nq.submit_many(QUEUE, ["small"] * 3):
        assert [info.status async for info in task.updates()][-1] is Status.COMPLETED

    # Cancels: two at once, one of a Go client, and one between two attempts.
    lasting, foreign = await nq.submit_many(QUEUE, ["lasts", "lasts"])
    failing = await nq.submit(QUEUE, "fails", retry=1)
    for task in (lasting, foreign):
        await reaches(task, Status.PROCESSING)

    async def told() -> bool:
        return (await lasting.fetch()).progress is not None

    await until_async(told)
    await asyncio.sleep(2 * WATCH_AFTER_SECONDS)  # longer runs are watched
    receipts = await asyncio.gather(lasting.cancel(wait=30), lasting.cancel(wait=30))
    assert {receipt.status for receipt in receipts} == {Status.CANCELLED}
    message = CancelMessage(foreign.id, f"{QUEUE}.cancel").encode()
    await operator.backend.connection.publish(f"{QUEUE}.cancel", message)
    assert await foreign.wait(30) is Status.CANCELLED
    await reaches(failing, Status.PENDING, attempt=2)
    assert (await failing.cancel()).status is Status.CANCELLED

    async for batch in nq.watch():
        if batch.complete:
            break
    assert {info.id for info in await nq.tasks(QUEUE)} >= {lasting.id, foreign.id, failing.id}
    assert [(info.name, info.workers) for info in await nq.queues()] == [(QUEUE, 1)]
    assert [info.queues for info in await nq.workers()] == [[QUEUE]]


async def test_the_documented_permissions_are_enough_and_each_is_used(
    server: nqnb.DevServer, used: dict[tuple[str, str], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    settings = users(server)
    await prepare(settings[OPERATOR])
    async with nqnb.connect(settings[CLIENT]) as nq, nqnb.connect(settings[OPERATOR]) as operator:
        pending, delayed = await nq.submit(QUEUE), await nq.submit(QUEUE, process_at=timedelta(hours=1))
        for task in (pending, delayed):
            assert (await task.cancel()).status is Status.DELETED
        many = await nq.submit_many(QUEUE, range(50))
        assert {each.status for each in await asyncio.gather(*(task.cancel() for task in many))} == {Status.DELETED}
        await nq.submit(QUEUE, "one", id="mine")
        await operator.backend.states.delete("mine")
        with pytest.raises(TaskExists):
            await nq.submit(QUEUE, "another", id="mine")

        async with make_worker(settings[WORKER]):
            await work(nq, operator)
            await operator.pause(QUEUE)
            held = await nq.submit(QUEUE, "small")

            # If the server can, the worker pauses the consumer again, because it may have been recreated.
            pauses = f"$JS.API.CONSUMER.PAUSE.{QUEUE}.MONITOR"
            sign = pauses if can_pause(nq.backend.connection) else "$JS.API.DIRECT.GET.KV_nq-queues.>"

            async def seen() -> bool:
                return any(covers(sign, subject) for subject in used[WORKER, "publish"])

            await until_async(seen)
            assert [info.paused for info in await nq.queues()] == [True]
            await operator.resume(QUEUE)
            assert await held.result(30) == "small"
        # Servers that can pause consumers can also read many messages with one request.
        idle = set() if can_pause(nq.backend.connection) else {pauses, f"$JS.API.DIRECT.GET.{QUEUE}"}
        if not can_schedule(nq.backend.connection):
            idle |= {f"{QUEUE}.sched.*", f"$JS.API.STREAM.PURGE.{QUEUE}"}

    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    for user in (CLIENT, WORKER):
        for verb in ("publish", "subscribe"):
            subjects = used[user, verb] | ({"_INBOX.1"} if verb == "subscribe" else set())
            unused = {
                pattern for pattern in allowed(user, verb) if not any(covers(pattern, subject) for subject in subjects)
            }
            assert unused <= idle, (user, verb)


async def test_tasks_wait_by_a_nak_if_the_stream_cannot_be_changed_for_schedules(server: nqnb.DevServer) -> None:
    settings = users(server)
    async with nqnb.connect(settings[OPERATOR]) as operator:
        await operator.submit(QUEUE, "small")
    await tasks_wait_by_a_nak(settings)


async def test_tasks_wait_by_a_nak_if_schedules_may_not_be_published() -> None:
    """Each schedule is refused, which must not prevent an outcome from being written."""
    with nqnb.DevServer(config=without(f"{QUEUE}.sched.*")) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        await tasks_wait_by_a_nak(settings)


async def tasks_wait_by_a_nak(settings: dict[str, nqnb.Settings]) -> None:
    """Check that tasks wait as on an older server, and that none is lost."""
    async with nqnb.connect(settings[CLIENT]) as nq, make_worker(settings[WORKER]):
        delayed = await nq.submit(QUEUE, "small", process_at=timedelta(hours=1))
        failing = await nq.submit(QUEUE, "fails", retry=1)
        await reaches(failing, Status.PENDING, attempt=2)

        async def both_wait() -> bool:
            (info,) = await nq.queues()
            return (info.pending, info.scheduled, info.processing) == (0, 2, 0)

        await until_async(both_wait)
        assert (await delayed.cancel()).status is Status.DELETED
        assert (await failing.cancel()).status is Status.CANCELLED


async def test_an_error_names_the_missing_permission(server: nqnb.DevServer, caplog: pytest.LogCaptureFixture) -> None:
    settings = users(server)
    with pytest.raises(ServerRefused, match=r"user 'client' may not publish to '\$JS.API.STREAM.CREATE.KV_nq-store'"):
        await nqnb.connect(settings[CLIENT]).open()
    await prepare(settings[OPERATOR])
    async with nqnb.connect(settings[CLIENT]) as nq:
        with pytest.raises(
            ServerRefused, match=r"may not publish to '\$JS.API.STREAM.CREATE.other'.*permissions.md"
        ) as caught:
            await nq.submit("other")
        assert (caught.value.code, caught.value.err_code) == (403, 0)
        with pytest.raises(ServerRefused, match=rf"may not publish to '\$JS.API.STREAM.DELETE.{QUEUE}'"):
            await nq.delete_queue(QUEUE)
        with pytest.raises(ServerRefused, match="user 'client' may not"):
            await nq.pause(QUEUE)
        with pytest.raises(ServerRefused, match="user 'client' may not"):
            await nq.prune(0)
    async with nqnb.connect(settings[WORKER]) as nq:
        with pytest.raises(ServerRefused, match=f"user 'worker' may not publish to '{QUEUE}.task'"):
            await nq.submit(QUEUE)
    worker = make_worker(settings[CLIENT])
    with pytest.raises(ServerRefused, match=rf"'\$JS.API.CONSUMER.INFO.{QUEUE}_cancel.{worker.id}'"):
        await worker.start()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_cancel_in_a_queue_whose_workers_may_not_be_notified_is_stored(server: nqnb.DevServer) -> None:
    settings = users(server)
    worker, started = nqnb.Worker(settings[OPERATOR]), asyncio.Event()

    @worker.handler("other")
    async def other(job: nqnb.Job) -> None:
        started.set()
        await asyncio.sleep(60)

    async with nqnb.connect(settings[OPERATOR]) as operator, worker, nqnb.connect(settings[CLIENT]) as nq:
        task = await operator.submit("other")
        await started.wait()
        with pytest.raises(
            nqnb.Unconfirmed, match=r"request is stored, so a worker will stop .*may not publish to 'other\.cancel'"
        ) as caught:
            await nq.cancel(task.id)
        assert caught.value.task_id == task.id
        assert await task.wait(30) is Status.CANCELLED
        assert (await nq.cancel(task.id)).status is Status.CANCELLED


@pytest.mark.full
async def test_a_refused_cancel_request_is_not_stored() -> None:
    config: str = CONFIG
    # The client is the first of the users.
    with nqnb.DevServer(config=config.replace('"$KV.nq-cancel.>"', '"nothing"', 1)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with make_worker(settings[WORKER]), nqnb.connect(settings[CLIENT]) as nq:
            task = await nq.submit(QUEUE, "lasts")
            await reaches(task, Status.PROCESSING)
            for queue in (None, QUEUE):
                with pytest.raises(ServerRefused, match=r"may not publish to '\$KV.nq-cancel"):
                    await nq.cancel(task.id, queue=queue)
            assert await task.status() is Status.PROCESSING


def test_the_command_line_names_the_missing_permission_in_one_line(
    server: nqnb.DevServer, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(prepare(users(server)[OPERATOR]))
    login = ("-u", server.url, "--user", CLIENT, "--password", PASSWORD)
    assert main([*login, "submit", "other"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "user 'client' may not publish to '$JS.API.STREAM.CREATE.other'" in line


def more_for(user: str, title: str) -> list[str]:
    """Return the subjects that a section of docs/permissions.md adds for a user."""
    (section,) = re.findall(rf"^## {title}\n.*?^```conf\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found, wanted = list[str](), True
    for line in section.splitlines():
        if "# a " in line:
            wanted = f"# a {user} " in line
        elif wanted:
            found += re.findall(r'"([^"]+)"', line)
    return found


def with_more(title: str, *given: str) -> str:
    """Return the configuration with the permissions that a section adds for some users."""
    config: str = CONFIG
    for user in given:
        more = " ".join(f'"{subject}",' for subject in more_for(user, title))
        before, after = config.split(f"\n{user} = {{\n  publish: [", 1)
        config = f"{before}\n{user} = {{\n  publish: [ {more}{after}"
    return config


def assert_more_is_used(title: str, used: dict[tuple[str, str], set[str]]) -> None:
    """Check that each user has needed what a section adds for the user."""
    for user in (CLIENT, WORKER):
        for subject in more_for(user, title):
            assert any(covers(subject, each) for each in used[user, "publish"]), (user, subject)


async def test_limits_and_serial_keys_need_the_documented_permissions(
    used: dict[tuple[str, str], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with nqnb.DevServer(config=with_more("Limits and serial keys", CLIENT, WORKER)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with nqnb.connect(settings[OPERATOR]) as operator:
            await operator.limit_queue(QUEUE, rate=100, concurrency=3)
        async with nqnb.connect(settings[CLIENT]) as nq, make_worker(settings[WORKER]):
            tasks = await nq.submit_many(QUEUE, ["small"] * 6, serial="customer-7")
            for task in tasks:
                assert await task.result(20) == "small"
            assert [(info.rate_limit, info.concurrency_limit) for info in await nq.queues()] == [(100, 3)]
    assert "may not" not in caplog.text
    assert_more_is_used("Limits and serial keys", used)


async def test_task_logs_need_the_documented_permissions(
    used: dict[tuple[str, str], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with nqnb.DevServer(config=with_more("Task logs", CLIENT, WORKER)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        for user in (OPERATOR, WORKER):
            worker = make_worker(settings[user])
            worker.task_logs = True
            async with worker, nqnb.connect(settings[CLIENT]) as nq:
                if user is WORKER:
                    task = await nq.submit(QUEUE, "tells")
                    await task.result(20)
                    assert [line.text async for line in task.logs()] == ["resizing"]
    assert "may not" not in caplog.text
    assert_more_is_used("Task logs", used)


async def test_the_exporter_needs_the_documented_permissions(
    used: dict[tuple[str, str], set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    (block,) = re.findall(r"^exporter = \{.*?^\}", PAGE, re.DOTALL | re.MULTILINE)
    login = f"{{ user: exporter, password: {PASSWORD}, permissions: $exporter }}"
    config = with_more("Limits and serial keys", WORKER).replace("users: [", f"users: [ {login}")
    with nqnb.DevServer(config=f"{block}\n{config}") as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with nqnb.connect(settings[OPERATOR]) as operator:
            await operator.submit(QUEUE)
            await operator.limit_queue(QUEUE, rate=100)
            await operator.pause(QUEUE)
        own = nqnb.Settings(server.url, user="exporter", password=PASSWORD)
        async with make_worker(settings[WORKER]), nqnb.connect(own) as nq, exporting(nq) as port:

            async def counted() -> bool:
                found = await scrape(port)
                tasks = found.of("nqnb_tasks", queue=QUEUE, state="pending")
                return (found.of("nqnb_up"), found.of("nqnb_workers"), tasks) == (1, 1, 1)

            await until_async(counted)
            stored = (await scrape(port)).of("nqnb_bucket_messages", bucket="nq-limits")
            assert stored == 1
    assert "may not" not in caplog.text
    (subjects,) = re.findall(r"publish: \[(.*?)\]", block, re.DOTALL)
    for subject in re.findall(r'"([^"]+)"', subjects):
        assert any(covers(subject, each) for each in used["exporter", "publish"]), subject


@pytest.mark.full
@pytest.mark.parametrize("title", ["Limits and serial keys", "Task logs"])
async def test_the_errors_of_a_worker_name_what_is_missing(title: str, caplog: pytest.LogCaptureFixture) -> None:
    with nqnb.DevServer(config=with_more(title, CLIENT)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        workers = {user: make_worker(settings[user]) for user in (OPERATOR, WORKER)}
        for worker in workers.values():
            worker.task_logs = title == "Task logs"
        async with nqnb.connect(settings[OPERATOR]) as operator:
            await operator.limit_queue(QUEUE, rate=100)
        async with workers[OPERATOR]:
            pass
        async with nqnb.connect(settings[CLIENT]) as nq:
            await nq.submit(QUEUE, "tells")

            async def is_told() -> bool:
                return any(f"may not publish to '{subject.lower()}" in caplog.text.lower() for subject in missing)

            missing = [subject.rstrip("*>") for subject in more_for(WORKER, title)]
            with contextlib.suppress(ServerRefused):
                async with workers[WORKER]:
                    await until_async(is_told)


@pytest.mark.parametrize("permitted", [True, False])
async def test_recurring_tasks_need_the_documented_permissions(
    caplog: pytest.LogCaptureFixture, permitted: bool
) -> None:
    with nqnb.DevServer(config=with_more("Recurring tasks", CLIENT, *([WORKER] if permitted else []))) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with nqnb.connect(settings[OPERATOR]) as operator:
            await operator.every("0 0 1 1 *", QUEUE, "small", name="rare")
            async with nqnb.connect(settings[CLIENT]) as nq, make_worker(settings[WORKER]):
                await nq.every("* * * * * *", QUEUE, "small", name="often")

                async def fired() -> bool:
                    return any(task.group == "often" for task in await nq.tasks())

                async def told() -> bool:
                    return "cannot read the schedules of recurring tasks" in caplog.text

                await until_async(fired if permitted else told)
                await nq.pause_schedule("often")
                assert len(await nq.schedules()) == 2
                await nq.remove_schedule("often")
                assert await fired() == permitted
    assert ("may not publish to" in caplog.text) == (not permitted)


async def test_a_client_without_the_permission_for_schedules_can_run_the_doctor(server: nqnb.DevServer) -> None:
    settings = users(server)
    await prepare(settings[OPERATOR])
    async with nqnb.connect(settings[OPERATOR]) as operator:
        await operator.every("0 0 1 1 *", QUEUE, "small", name="rare")
        await operator.submit(QUEUE, "small")
        seen = await operator.doctor(QUEUE, ignore="old-server")
        assert [each.code for each in seen.findings] == ["no-worker", "idle-schedule"]
    async with nqnb.connect(settings[CLIENT]) as nq:
        seen = await nq.doctor(QUEUE, ignore="old-server")
        assert [each.code for each in seen.findings] == ["no-worker"]


async def test_a_refused_pull_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A refused pull gets no answer, so the worker logs it."""
    pulls = f"$JS.API.CONSUMER.MSG.NEXT.{QUEUE}.MONITOR"
    with nqnb.DevServer(config=without(pulls)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with make_worker(settings[WORKER]):

            async def told() -> bool:
                return any(record.name == LOGGER for record in caplog.records)

            await until_async(told)
    assert f"user 'worker' may not publish to '{pulls.lower()}'" in caplog.text


async def test_a_refused_renewal_is_logged_once_and_does_not_affect_other_queues(
    caplog: pytest.LogCaptureFixture,
) -> None:
    acks = f"$JS.ACK.{QUEUE}.MONITOR.>"
    with nqnb.DevServer(config=without(acks)) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with make_worker(settings[WORKER]), nqnb.connect(settings[CLIENT]) as nq:
            await nq.submit(QUEUE, "lasts")
            await until_async(lambda: "its lease has run out" in caplog.text)
    assert caplog.text.count("because renewing their leases failed") == 1
    assert f"queue {QUEUE}: running tasks will be stopped" in caplog.text
    assert f"user 'worker' may not publish to '{acks.rstrip('>')}" in caplog.text
    assert "unexpected error" not in caplog.text


async def test_a_watch_without_permission_ends() -> None:
    with nqnb.DevServer(config=without("$JS.API.CONSUMER.CREATE.KV_nq-store")) as server:
        settings = users(server)
        await prepare(settings[OPERATOR])
        async with nqnb.connect(settings[CLIENT]) as nq:
            with pytest.raises(ServerRefused, match="may not publish to"):
                await asyncio.wait_for(anext(nq.watch()), 30)


async def test_without_permission_for_an_inbox_the_connect_is_refused() -> None:
    told = r"permissions violation for subscription to \"_inbox.*permissions.md"
    with nqnb.DevServer(config=without("_INBOX.>")) as server, pytest.raises(NoServer, match=told):
        await nqnb.connect(users(server)[CLIENT]).open()
