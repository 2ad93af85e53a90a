"""The command ``nqnb submit``, which submits one or more tasks to a queue."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Collection
from typing import IO, Any, Literal

import click
from msgspec import structs

from nqnb import payload as payloads
from nqnb.batch import Batch, Item
from nqnb.client import Client, Task
from nqnb.commands import shell_completion
from nqnb.commands.arguments import count_tasks, exclusive_flag
from nqnb.commands.command import Command, ask, front_of, say_if_unserved, saying_if_unserved
from nqnb.commands.command_records import CommandProgress, RefusedLine, Submitted, Value
from nqnb.commands.param_types import AtLeast, future_moment, queue_name, seconds, serial_key, task_id
from nqnb.error_text import shown
from nqnb.errors import BadInput, ConnectionFailed, NqnbError, Unconfirmed
from nqnb.garbage import rare_collections
from nqnb.protocol.bulk import IN_FLIGHT, outcomes_of

_PROGRESS_TASKS = 100
"""The number of tasks submitted between two progress reports."""
_SETTLE_SECONDS = 2.0
"""How long an interrupted command waits for the server to answer the requests in flight."""
_SLOW_SECONDS = 1.0
"""The interval between two checks of the connection while lines are submitted."""
_MAX_UNANSWERED = 2
"""The number of consecutive unanswered requests, per concurrent request, after which the command stops."""
_FOREVER = "forever"
_QUOTE_HINT = "Quote the JSON for the shell, as in '{\"a\": 1}', or use "

PayloadForm = Literal["json", "text", "raw"]


class PayloadFile(click.File):
    """A file to read, or ``-`` for stdin. If stdin is closed, a usage error is reported."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Open the file, as `click.File.convert` does."""
        if value == "-" and sys.stdin is None:
            self.fail("the payload cannot be read: stdin is closed. Pass the path of a file with --file", param, ctx)
        return super().convert(value, param, ctx)


def _wait(text: str) -> float | None:
    if text == _FOREVER:
        return None
    try:
        return seconds(text)
    except click.BadParameter as error:
        raise click.BadParameter(
            f"{error.message}. To wait without a time limit, put --wait last, or write --wait={_FOREVER}"
        ) from None


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb submit resize '{"path": "a.png"}' --retry 2
  nqnb submit resize --file job.json --deadline 18h
  nqnb submit resize --file job.json --process-at 07:00
  nqnb submit greet --text hello --wait 30
  seq 1000 | nqnb submit square --lines -
""",
)
@click.argument("queue", type=queue_name, shell_complete=shell_completion.queues)
@click.argument("payload", required=False)
@click.option("--id", type=task_id, metavar="ID", help="Task id  [generated]")
@click.option("--retry", type=AtLeast(0), default=0, metavar="N", help="Retry the task up to N times if it fails  [0]")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="Time limit for each run (90, 10m, 2h)  [no limit]")
@click.option(
    "--deadline",
    type=future_moment,
    metavar="WHEN",
    help="Fail the task if it has not ended by WHEN (10m, 18:00, 2030-12-31T18:00)",
)
@click.option(
    "--process-at",
    type=future_moment,
    metavar="WHEN",
    help="Do not start the task before WHEN (10m, 07:00, 2030-12-31T18:00)",
)
@click.option("--serial", type=serial_key, metavar="KEY", help="Run only one task of the queue with this KEY at a time")
@click.option("--file", type=PayloadFile("rb"), metavar="PATH", help="Read the payload from a file")
@click.option("--lines", is_flag=True, help="Submit one task for each non-blank line of the file or stdin")
@click.option(
    "--ordered",
    is_flag=True,
    help="Submit the lines in order. This is slower: by default, many lines are sent at once, in any order",
)
@click.option("--text", is_flag=True, help="Send the payload as a JSON string")
@click.option("--raw", is_flag=True, help="Send the payload as raw bytes")
@click.option(
    "--wait",
    is_flag=False,
    flag_value=_FOREVER,
    type=_wait,
    metavar="[SECONDS]",
    help="Wait for the task's result and print the result; SECONDS limits the wait. Cannot be combined with --lines",
)
@click.pass_context
def submit(
    ctx: click.Context,
    /,
    queue: str,
    payload: str | None,
    id: str | None,
    file: IO[bytes] | None,
    lines: bool,
    ordered: bool,
    text: bool,
    raw: bool,
    **options: Any,
) -> Submitted | Value:
    """Submit a task to QUEUE, and print the task's id.

    PAYLOAD is JSON, or `-` to read JSON from stdin. Without PAYLOAD, the payload is null. See also --text, --raw and
    --file.
    """
    waits = ctx.get_parameter_source("wait") is not click.core.ParameterSource.DEFAULT
    wait: float | None = options.pop("wait")
    if payload is not None and file is not None:
        raise click.UsageError("too many payloads: PAYLOAD and --file cannot be combined. Use only one")
    if lines and (id is not None or waits):
        raise click.UsageError(
            f"too many options: --lines submits many tasks, but {'--wait' if waits else '--id'} is for a single task. "
            + (
                "To wait for the tasks, run `nqnb watch ID…` with the printed ids"
                if waits
                else "Use only one of these options"
            )
        )
    if ordered and not lines:
        raise click.UsageError("--ordered has no effect without --lines. Add --lines, or remove --ordered")
    exclusive_flag(text=text, raw=raw)
    form: PayloadForm = "text" if text else "raw" if raw else "json"
    data = read_payload(ctx, payload, file)
    if not lines:
        value = encode_payload(data, form, "the payload", quoted=payload not in (None, "-"))
        return ask(ctx, lambda nq: _submit_one(ctx, nq, queue, value, id=id, wait=wait, waits=waits, **options))
    if data is None:
        raise click.UsageError("--lines has nothing to read: no input was specified. Use --file PATH, or `-` for stdin")
    values = {
        number: encode_payload(line.rstrip(b"\r\n"), form, f"line {number}")
        for number, line in enumerate(data.splitlines(keepends=True), 1)
        if line.strip()
    }
    outcomes: list[Task | NqnbError | None] = []
    try:
        ask(ctx, lambda nq: _submit_all(ctx, nq, queue, values.values(), outcomes, ordered=ordered, **options))
    except KeyboardInterrupt as interrupt:
        interrupt.args = (_interrupted(list(values), outcomes),)
        front_of(ctx).show(_submitted(queue, list(values), outcomes))
        raise
    made = _submitted(queue, list(values), outcomes)
    rest = list(values)[len(outcomes) :]
    return structs.replace(made, rest=rest[0]) if rest else made


async def _submit_one(
    ctx: click.Context, nq: Client, queue: str, value: bytes, *, wait: float | None, waits: bool, **options: Any
) -> Submitted | Value:
    task = await nq.submit(queue, value, **options)
    if not waits:
        await say_if_unserved(ctx, nq, queue)
        return Submitted(queue, [task.id])
    front_of(ctx).say(task.id)
    front_of(ctx).waits_for(task.id)
    async with saying_if_unserved(ctx, nq, task.id):
        return Value(await task.result(wait), task.id, queue)


async def _submit_all(
    ctx: click.Context,
    nq: Client,
    queue: str,
    values: Collection[bytes],
    outcomes: list[Task | NqnbError | None],
    *,
    ordered: bool,
    **options: Any,
) -> None:
    """Submit the payloads, and store one item in ``outcomes`` for each payload that is sent.

    The item is None until the server answers. If this coroutine is cancelled, or the server accepts no task for a
    while, no more payloads are sent. The requests in flight may still be answered.
    """
    batch = Batch(queue, values, **options)
    at_once = 1 if ordered else IN_FLIGHT
    accepted, unanswered, stopped = 0, 0, False

    async def submit_one(item: Item) -> None:
        nonlocal accepted, unanswered, stopped
        outcomes.append(None)
        try:
            outcomes[item.position] = await nq.submit_item(batch, item)
            accepted, unanswered = accepted + 1, 0
        except NqnbError as error:
            outcomes[item.position] = error
            unanswered = unanswered + 1 if isinstance(error, (ConnectionFailed, Unconfirmed)) else 0
            # Each of these requests was repeated for a while, so all lines together could take hours.
            stopped = stopped or unanswered >= _MAX_UNANSWERED * at_once
        if len(outcomes) % _PROGRESS_TASKS == 0:
            show(CommandProgress(accepted, len(values), "tasks submitted"))

    with rare_collections(), front_of(ctx).live() as show:
        left = itertools.takewhile(lambda _: not stopped, batch)
        sending = asyncio.ensure_future(outcomes_of(left, submit_one, at_once))
        try:
            await _with_word_of_outage(ctx, nq, sending)
        except asyncio.CancelledError:
            stopped = True
            await asyncio.wait({sending}, timeout=_SETTLE_SECONDS)
            sending.cancel()
            raise
        finally:
            show(CommandProgress(accepted, len(values), "tasks submitted"))
    if accepted:
        await say_if_unserved(ctx, nq, queue)


async def _with_word_of_outage(ctx: click.Context, nq: Client, sending: asyncio.Future[Any]) -> None:
    """Wait for a future, and tell the user once if the connection is lost.

    If this coroutine is cancelled, the future continues.
    """
    while not sending.done():
        await asyncio.wait({sending}, timeout=_SLOW_SECONDS)
        if not sending.done() and not nq.backend.connected:
            front_of(ctx).say("the server is not answering; the requests are being repeated")
            break
    await asyncio.shield(sending)


def _submitted(queue: str, numbers: list[int], outcomes: list[Task | NqnbError | None]) -> Submitted:
    """Return a record of the outcomes. ``numbers`` contains the line numbers of the payloads."""
    ids = [each.id for each in outcomes if isinstance(each, Task)]
    refused = {number: each for number, each in zip(numbers, outcomes, strict=False) if isinstance(each, NqnbError)}
    return Submitted(queue, ids, many=True, refused=refused)


def _interrupted(numbers: list[int], outcomes: list[Task | NqnbError | None]) -> str:
    """Return a message that says which lines were submitted before an interrupt.

    ``numbers`` contains the line numbers of the payloads, and ``outcomes`` one item for each payload that was sent.
    """
    known = sum(isinstance(each, Task) for each in outcomes)
    unsure = sum(each is None or isinstance(each, Unconfirmed) for each in outcomes)
    refused = [
        RefusedLine(number, each)
        for number, each in zip(numbers, outcomes, strict=False)
        if isinstance(each, NqnbError) and not isinstance(each, Unconfirmed)
    ]
    text = f"interrupted; submitted {known:,} of {count_tasks(len(numbers))}"
    text += f"; up to {unsure:,} more were sent, but not confirmed by the server" if unsure else ""
    text += f"; refused: {len(refused):,} (first error: {refused[0]})" if refused else ""
    rest = numbers[len(outcomes) :]
    return text + (f". To submit the rest, continue from line {rest[0]}" if rest else "")


def read_payload(ctx: click.Context, payload: str | None, file: IO[bytes] | None) -> bytes | None:
    """Return the payload from the command line, a file or stdin, or None if there is no payload."""
    try:
        if file is not None:
            return file.read()
        if payload == "-":
            return front_of(ctx).stdin("the payload", "Pass the path of a file with --file")
    except OSError as error:
        raise click.UsageError(f"the payload cannot be read: {error.strerror}. Check the file") from None
    try:
        return None if payload is None else payload.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a notebook cell can contain any lone surrogate, not only an escaped byte
        raise click.UsageError(
            f"the payload {shown(payload)} is invalid: it contains a lone surrogate. Remove or replace that character."
        ) from None


def encode_payload(data: bytes | None, form: PayloadForm, what: str, *, quoted: bool = False) -> bytes:
    """Return the payload as the bytes to send.

    Args:
        data: the payload that the user passed, or None to send null.
        form: the form in which the payload is sent.
        what: the name of the payload in error messages, such as "line 3".
        quoted: whether a shell may have removed quotes from the payload.

    Raises:
        UsageError: the payload is not JSON or, with the form ``text``, is not UTF-8.
    """
    if data is None:
        return b"null"
    if form == "raw":
        return data
    if form == "text":
        try:
            return json.dumps(data.decode("utf-8"), ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise click.UsageError(
                f"{what} cannot be sent as text: the bytes are not UTF-8 ({error}). "
                "Use --raw to send the bytes unchanged"
            ) from None
    if not data.strip():
        raise click.UsageError(f"{what} is invalid JSON: it is empty. Write null, or use --text for an empty string")
    try:
        payloads.decode_json(data)
    except BadInput as error:
        start = data[:40].decode("utf-8", "replace")
        raise click.UsageError(
            f"{what} is invalid JSON: {error} ({start!r}{'…' if len(data) > 40 else ''}). "
            f"{_QUOTE_HINT if quoted else 'Use '}--text for plain text or --raw for bytes"
        ) from None
    return data.strip()
