"""The health check ``nqnb check``."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import nats
import pytest
from helpers.command_line import NOBODY, Many, Run, Start, one_line, until_said
from helpers.waiting import until

import nqnb
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.protocol import names


@pytest.fixture
def url() -> Iterator[str]:
    """Start a server for one test, because a check without a queue includes all queues."""
    with nqnb.DevServer() as server:
        yield server.url


def fail(url: str, queue: str, payloads: Sequence[str]) -> list[str]:
    """Run tasks that fail, and return their ids."""

    async def fail() -> list[str]:
        worker = nqnb.Worker(url)

        @worker.handler(queue)
        async def broken(job: nqnb.Job, payload: str) -> None:
            raise ValueError(payload)

        async with worker, nqnb.connect(url) as nq:
            tasks = await nq.submit_many(queue, payloads)
            for task in tasks:
                assert await task.wait(20) is nqnb.Status.FAILED
            return [task.id for task in tasks]

    return asyncio.run(fail())


def test_check_has_an_exit_code_for_a_health_check(url: str, run: Run, many: Many) -> None:
    fail(url, "ill", ["bad", "worse"])
    run("submit", "ill", "1", "--process-at", "1h")
    assert run("check").code == 0
    assert run("check", "ill", "--max-oldest", "1h", "--max-failed", "2", "--since", "1h").code == 0
    many("ill", 1)
    answer = run("check", "ill", "--min-workers", "1", "--max-oldest", "0.001", "--max-failed", "1")
    assert answer.code == 1
    for found in ("workers +FAILS +0", "oldest +FAILS", "failed +FAILS +2 tasks", "server +ok"):
        assert re.search(found, answer.out), found
    asked = run("check", "ill", "--max-failed", "1", "--json").json
    assert [(each["name"], each["ok"]) for each in asked["checks"]] == [
        ("server", True),
        ("served", False),
        ("failed", False),
    ]
    assert run("check", "no-such-queue").code == 1
    refused = run("check", "--max-failed", "-3")
    assert (refused.code, "expected a whole number of at least 0, got '-3'" in refused.err) == (2, True)
    assert run("check", "--since", "1h").code == 2
    assert run("check", server=NOBODY).code == 3


def test_requeued_failures_are_not_counted(url: str, run: Run) -> None:
    first, _ = fail(url, "ill", ["bad", "worse"])
    answer = run("check", "ill", "--max-failed", "1")
    assert (answer.code, one_line(answer.err)) == (1, True)
    assert answer.err.endswith(". See `nqnb tasks ill -s failed --not-requeued`.\n")
    run("task", "requeue", first)
    answer = run("check", "ill", "--max-failed", "1")
    assert re.search(r"failed +ok +1 task \(at most 1\)", answer.out)


class TestServed:
    def test_waiting_tasks_need_a_worker(self, run: Run, many: Many) -> None:
        run("submit", "later", "1", "--process-at", "1h")
        assert [run("check").code, run("check", "later").code] == [0, 0]
        many("slow", 3)
        for words in (["check"], ["check", "slow"], ["check", "--min-workers", "1"]):
            answer = run(*words)
            assert (answer.code, one_line(answer.err)) == (1, True)
            assert "no worker is serving queue 'slow', in which 3 tasks are waiting" in answer.err
            assert "See `nqnb workers`" in answer.err
        assert run("check", "later").code == 0
        run("queue", "purge", "slow", "--yes")
        assert [run("check").code, run("check", "slow").code] == [0, 0]

    def test_tasks_of_a_dead_worker_are_waiting(
        self, url: str, run: Run, many: Many, start: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "jobs.py").write_text(
            "import asyncio, nqnb\nworker = nqnb.Worker(concurrency=2)\n"
            "@worker.handler('slow')\nasync def slow(job, payload):\n    await asyncio.sleep(60)\n"
        )
        process = start("worker", "jobs:worker", "-u", url, cwd=tmp_path)
        until_said(process, "is serving slow")
        many("slow", 2)
        until(lambda: len(run("tasks", "-s", "processing", "--json").json) == 2, what="both tasks run")
        assert [run("check").code, run("check", "slow").code] == [0, 0]
        process.kill()
        process.wait()

        async def forget_the_worker() -> None:
            async with nqnb.connect(url) as nq:
                for each in await nq.workers():
                    await nq.backend.presence.withdraw(each.id)

        asyncio.run(forget_the_worker())
        until(lambda: run("check").code == 1, what="the check reports the abandoned tasks")
        assert "no worker is serving queue 'slow', in which 2 tasks are waiting" in run("check", "slow").err

    def test_a_go_worker_serves_the_queue(self, url: str, run: Run) -> None:
        async def serve() -> list[int]:
            """Pull as a Go worker does, and return the exit codes of the checks in each phase."""
            async with nqnb.connect(url) as nq:
                streams = await nq.backend.ensure_queue("go")
                await ensure_consumer(nq.backend.connection, streams)
                go = await nats.connect(url)
                store = await go.jetstream().key_value(nq.settings.state_bucket)
                inbox = await go.subscribe("go.inbox")

                async def pull() -> None:
                    subject = f"$JS.API.CONSUMER.MSG.NEXT.{streams.tasks}.{names.CONSUMER}"
                    await go.publish(subject, b'{"batch":1,"expires":30000000000}', "go.inbox")
                    await go.flush()

                codes = []
                first, _ = await nq.submit_many("go", [1, 2])
                codes.append((await asyncio.to_thread(run, "check", "go")).code)
                await pull()
                await inbox.next_msg(timeout=30)
                # A Go worker writes the state without a worker id.
                entry = json.loads((await store.get(first.id)).value or b"")
                entry["Status"] = nqnb.Status.PROCESSING
                entry.pop("Meta", None)
                await store.put(first.id, json.dumps(entry).encode())
                codes += [(await asyncio.to_thread(run, *words)).code for words in (["check", "go"], ["check"])]
                await go.close()
                return codes

        assert asyncio.run(serve()) == [1, 0, 0]


def test_only_a_failed_check_writes_to_stderr(run: Run, many: Many) -> None:
    answer = run("check", "--max-oldest", "5m")
    assert (answer.code, answer.err) == (0, "")
    many("slow", 1)
    answer = run("check", "--max-oldest", "5m")
    assert (answer.code, one_line(answer.err)) == (1, True)
