"""The group ``nqnb schedule``: add, list, pause, resume, run and remove the schedules of recurring tasks."""

from __future__ import annotations

import asyncio
import re

import pytest
from helpers.command_line import Run, one_line
from helpers.raw_client import RawClient
from helpers.waiting import until

import nqnb
from nqnb.jetstream.queue_streams import ensure_consumer
from nqnb.protocol.recurring import ScheduleEntry
from nqnb.recurrence import Recurrence

MORNINGS = ("schedule", "add", "mornings", "report", '{"a": 1}', "--cron", "0 7 * * mon-fri")


def test_only_nqnb_workers_submit_the_tasks_of_a_schedule(run: Run, url: str) -> None:
    async def make_consumer() -> None:
        async with nqnb.connect(url) as nq:
            await ensure_consumer(nq.backend.connection, await nq.backend.ensure_queue("feeds"))

    asyncio.run(make_consumer())
    go = RawClient(url)
    try:
        go.subscribe(b"go.inbox")
        go.publish(b"$JS.API.CONSUMER.MSG.NEXT.feeds.MONITOR go.inbox", b'{"batch":1,"expires":30000000000}')
        until(lambda: "no worker is serving" not in run("submit", "feeds").err)
        said = run("schedule", "add", "feeds", "feeds", "--every", "5m").err
    finally:
        go.close()
        run("schedule", "remove", "feeds")
    assert "no nqnb worker is serving queue 'feeds': the schedule submits no tasks until" in said


def test_a_schedule_from_its_definition_to_its_removal(run: Run) -> None:
    assert run("schedule", "list").out == "no schedules\n"
    made = run(*MORNINGS, "--timezone", "Europe/Berlin", "--retry", "2", "--timeout", "90")
    assert made.code == 0, made.err
    assert re.search(r"when +0 7 \* \* mon-fri Europe/Berlin\n", made.out)
    assert re.search(r"next +.*\(in \d+[smhd]\)\n", made.out)
    assert "no nqnb worker is serving queue 'report': the schedule submits no tasks until" in made.err
    again = run(*MORNINGS, "--timezone", "Europe/Berlin", "--retry", "2", "--timeout", "90", "--json").json
    assert (again["retry"], again["timeout"], again["payload"], again["missed"]) == (2, 90, {"a": 1}, "once")

    refused = run(*MORNINGS)
    assert refused.code == 1
    assert one_line(refused.err)
    assert "replace the schedule (replace=True, or --replace)" in refused.err
    assert run(*MORNINGS, "--replace", "--json").json["timezone"] == "UTC"

    poll = run("schedule", "add", "poll", "fetch", "feed 7", "--text", "--every", "5m", "--missed", "skip", "--json")
    assert (poll.json["interval"], poll.json["payload"], poll.json["missed"]) == (300, "feed 7", "skip")
    paused = run("schedule", "pause", "poll")
    assert re.search(r"paused +no tasks until `nqnb schedule resume poll`\n", paused.out)
    listed = run("schedule", "list").out
    assert re.search(r"^mornings +report +0 7 \* \* mon-fri UTC +.* once +\{\"a\": 1\}$", listed, re.MULTILINE)
    assert re.search(r"^poll +paused +fetch +every 5 minutes +skip +\"feed 7\"$", listed, re.MULTILINE)
    assert [each["name"] for each in run("schedule", "list", "--json").json] == ["mornings", "poll"]
    assert run("schedule", "resume", "poll", "--json").json["paused"] is False

    task_id = run("schedule", "run", "poll").out.strip()
    assert run("task", "show", task_id, "--json").json["group"] == "poll"
    assert run("schedule", "remove", "poll").out == "schedule poll was removed; its tasks are kept\n"
    assert run("task", "show", task_id).code == 0
    gone = run("schedule", "pause", "poll")
    assert gone.code == 1
    assert one_line(gone.err)
    assert "schedule 'poll' is unknown" in gone.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "a", "report"), "expected either --cron or --every"),
        (("add", "a", "report", "--cron", "@daily", "--every", "5m"), "expected either --cron or --every"),
        (("add", "a", "report", "--cron", "soon"), "wrong number of fields"),
        (("add", "a", "report", "--cron", "@daily", "--timezone", "Mars"), "no such time zone"),
        (("add", "a", "report", "--every", "5m", "--timezone", "UTC"), "an interval has no time zone"),
        (("add", "a", "report", "--every", "0.5"), "whole number of seconds"),
        (("add", "a", "report", "--every", "5m", "--missed", "twice"), "--missed"),
        (("add", "a", "report", "{", "--every", "5m"), "invalid JSON"),
        (("add", "a b", "report", "--every", "5m"), "name='a b' is invalid"),
        (("add", "a", "a/b", "--every", "5m"), "queue name 'a/b' is invalid"),
        (("pause", "../x"), "name='../x' is invalid"),
    ],
)
def test_invalid_command_lines_are_refused(run: Run, arguments: tuple[str, ...], said: str) -> None:
    answer = run("schedule", *arguments)
    assert answer.code == 2
    assert said in answer.err


async def put(url: str, name: str, data: bytes) -> None:
    async with nqnb.connect(url) as nq:
        await nq.backend.ensure_recurring()
        await nq.backend.recurring.put(name, data)


def test_text_from_the_server_is_escaped(url: str, run: Run) -> None:
    hostile = "\x1b[31m\u202e"
    entry = ScheduleEntry(
        name="hostile",
        queue="report",
        when=Recurrence(interval=60),
        payload=f'"{hostile}"'.encode(),
        client=hostile,
        written=1_700_000_000.0,
    )
    asyncio.run(put(url, "hostile", entry.encode()))
    for arguments in (("schedule", "list"), ("schedule", "pause", "hostile"), ("schedule", "list", "--json")):
        out = run(*arguments).out
        assert "hostile" in out
        assert "\x1b" not in out
        assert "\u202e" not in out
