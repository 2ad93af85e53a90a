"""Commands for recurring tasks: the ``nqnb schedule`` group."""

from __future__ import annotations

from typing import IO, Any

import click

from nqnb.client import Client
from nqnb.commands import shell_completion
from nqnb.commands.arguments import exclusive_flag
from nqnb.commands.command import Group, ask, front_of, help_alone, say_if_unserved
from nqnb.commands.command_records import ScheduleRemoved, Schedules, Submitted
from nqnb.commands.param_types import AtLeast, queue_name, schedule_name, seconds, serial_key
from nqnb.commands.submit_command import PayloadFile, PayloadForm, encode_payload, read_payload
from nqnb.records import ScheduleInfo

_name_argument = click.argument("named", type=schedule_name, metavar="NAME", shell_complete=shell_completion.schedules)


@click.group(
    cls=Group,
    epilog="""\b
Examples:
  nqnb schedule add nightly report --cron '0 7 * * mon-fri' --timezone Europe/Berlin
  nqnb schedule list
  nqnb schedule pause nightly
""",
)
@click.pass_context
def schedule(ctx: click.Context) -> str | None:
    """List, add, pause, run and remove recurring tasks."""
    return help_alone(ctx)


@schedule.command("list", epilog="\b\nExample:\n  nqnb schedule list --json")
@click.pass_context
def schedule_list(ctx: click.Context) -> Schedules:
    """List the schedules, with their next and last scheduled times."""

    async def question(nq: Client) -> Schedules:
        return Schedules(await nq.schedules())

    return ask(ctx, question)


@schedule.command(
    "add",
    epilog="""\b
Examples:
  nqnb schedule add nightly report --cron '0 7 * * mon-fri' --timezone Europe/Berlin
  nqnb schedule add poll fetch '{"feed": 7}' --every 5m --missed skip
""",
)
@_name_argument
@click.argument("queue", type=queue_name, shell_complete=shell_completion.queues)
@click.argument("payload", required=False)
@click.option("--cron", metavar="TEXT", help="Times, such as '0 7 * * mon-fri' (minute hour day month weekday)")
@click.option("--timezone", metavar="ZONE", help="Time zone of --cron, such as Europe/Berlin  [UTC]")
@click.option("--every", type=seconds, metavar="LENGTH", help="Interval, such as 90s, 5m or 1d")
@click.option(
    "--missed",
    type=click.Choice(("skip", "once", "all")),
    default="once",
    show_default=True,
    help="What to submit for times missed by more than a minute: no task, one task, or all tasks (at most 100)",
)
@click.option("--retry", type=AtLeast(0), default=0, metavar="N", help="Retry a task up to N times if it fails  [0]")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Time limit for each run (90, 10m, 2h)  [no limit]")
@click.option("--serial", type=serial_key, metavar="KEY", help="Run only one task of the queue with this KEY at a time")
@click.option("--file", type=PayloadFile("rb"), metavar="PATH", help="Read the payload from a file")
@click.option("--text", is_flag=True, help="Send the payload as a JSON string")
@click.option("--raw", is_flag=True, help="Send the payload as raw bytes")
@click.option("--replace", is_flag=True, help="Replace the existing schedule NAME if its definition is different")
@click.pass_context
def schedule_add(
    ctx: click.Context,
    /,
    named: str,
    queue: str,
    payload: str | None,
    every: float | None,
    file: IO[bytes] | None,
    text: bool,
    raw: bool,
    **options: Any,
) -> ScheduleInfo:
    """Add the schedule NAME, which submits tasks to QUEUE. Use either --cron or --every.

    PAYLOAD is JSON, or `-` to read JSON from stdin. Without PAYLOAD, the payload is null. If the schedule exists with
    the same definition, nothing changes. The nqnb workers of the queue submit the tasks.
    """
    if (options["cron"] is None) == (every is None):
        raise click.UsageError(
            "the schedule's times are invalid: expected either --cron or --every. Use exactly one of them"
        )
    if payload is not None and file is not None:
        raise click.UsageError("too many payloads: PAYLOAD and --file cannot be combined. Use only one")
    exclusive_flag(text=text, raw=raw)
    form: PayloadForm = "text" if text else "raw" if raw else "json"
    data = read_payload(ctx, payload, file)
    value = encode_payload(data, form, "the payload", quoted=payload not in (None, "-"))

    async def question(nq: Client) -> ScheduleInfo:
        made = await nq.every(queue=queue, payload=value, name=named, seconds=every or 0, **options)
        if not front_of(ctx).json and await nq.serving.is_missing(queue, nqnb_only=True):
            front_of(ctx).say(
                f"no nqnb worker is serving queue {queue!r}: the schedule submits no tasks until a worker serves the "
                "queue. Start an nqnb worker, or check the queue name."
            )
        return made

    return ask(ctx, question)


@schedule.command("pause", epilog="\b\nExample:\n  nqnb schedule pause nightly")
@_name_argument
@click.pass_context
def schedule_pause(ctx: click.Context, named: str) -> ScheduleInfo:
    """Pause a schedule until it is resumed. Tasks that it has submitted continue."""
    return ask(ctx, lambda nq: nq.pause_schedule(named))


@schedule.command("resume", epilog="\b\nExample:\n  nqnb schedule resume nightly")
@_name_argument
@click.pass_context
def schedule_resume(ctx: click.Context, named: str) -> ScheduleInfo:
    """Resume a paused schedule. Times that passed in the meantime are skipped."""
    return ask(ctx, lambda nq: nq.resume_schedule(named))


@schedule.command("remove", epilog="\b\nExample:\n  nqnb schedule remove nightly")
@_name_argument
@click.pass_context
def schedule_remove(ctx: click.Context, named: str) -> ScheduleRemoved:
    """Remove a schedule. The tasks that it has submitted are kept."""

    async def question(nq: Client) -> ScheduleRemoved:
        await nq.remove_schedule(named)
        return ScheduleRemoved(named)

    return ask(ctx, question)


@schedule.command("run", epilog="\b\nExample:\n  nqnb schedule run nightly")
@_name_argument
@click.pass_context
def schedule_run(ctx: click.Context, named: str) -> Submitted:
    """Submit a task of a schedule now, and print the task's id. The scheduled times do not change."""

    async def question(nq: Client) -> Submitted:
        task = await nq.run_schedule(named)
        await say_if_unserved(ctx, nq, task.queue)
        return Submitted(task.queue, [task.id])

    return ask(ctx, question)
