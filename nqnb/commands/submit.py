"""`nqnb submit`: put tasks into a queue."""

from __future__ import annotations

import json
import sys
from typing import IO, Any, Literal

import click

from nqnb import payload as payloads
from nqnb.client import Client
from nqnb.commands import complete
from nqnb.commands.arguments import one_of
from nqnb.commands.options import Command, ask, front_of
from nqnb.commands.records import Progress, Submitted, Value
from nqnb.commands.values import coming_moment, moment, queue_name, seconds, task_id
from nqnb.error_text import shown
from nqnb.errors import BadInput, NqnbError
from nqnb.task import Task

_BATCH = 2000
_FOREVER = "forever"
_QUOTE = "quote it for the shell like '{\"a\": 1}', or "

Form = Literal["json", "text", "raw"]


class _File(click.File):
    """A file, or stdin as ``-``, which a shell may have closed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType.convert`."""
        if value == "-" and sys.stdin is None:
            self.fail("stdin is closed, so nothing comes in there", param, ctx)
        return super().convert(value, param, ctx)


def _wait(text: str) -> float | None:
    if text == _FOREVER:
        return None
    try:
        return seconds(text)
    except click.BadParameter as error:
        raise click.BadParameter(
            f"{error.message}; a time is optional here, so put --wait last, or write --wait=10 or --wait={_FOREVER}"
        ) from None


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb submit resize '{"path": "a.png"}' --retry 2
  nqnb submit resize --file job.json --deadline 18h
  nqnb submit greet --text hello --wait 30
  seq 1000 | nqnb submit square --lines -
""",
)
@click.argument("queue", type=queue_name, shell_complete=complete.queues)
@click.argument("payload", required=False)
@click.option("--id", type=task_id, metavar="ID", help="An id of your own; default a fresh one")
@click.option("--retry", type=click.IntRange(0), default=0, metavar="N", help="Attempts after the first, if it fails")
@click.option("--timeout", type=seconds, metavar="SECONDS", help="How long one attempt may run (90, 10m, 2h)")
@click.option("--deadline", type=coming_moment, metavar="WHEN", help="When it must have ended (10m, 2030-12-31T18:00)")
@click.option("--process-at", type=moment, metavar="WHEN", help="When it may start, likewise")
@click.option("--file", type=_File("rb"), metavar="PATH", help="Take the payload from a file")
@click.option("--lines", is_flag=True, help="One task a line of the file, or of -; empty lines are left out")
@click.option("--text", is_flag=True, help="The payload is plain text, sent as a JSON string")
@click.option("--raw", is_flag=True, help="The payload is sent byte by byte, whatever it is")
@click.option(
    "--wait",
    is_flag=False,
    flag_value=_FOREVER,
    type=_wait,
    metavar="[SECONDS]",
    help="Wait for the result and print it, at most that long",
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
    text: bool,
    raw: bool,
    **options: Any,
) -> Submitted | Value:
    """Put a task into QUEUE and print its id.

    PAYLOAD is JSON (null, if there is none), or `-` for what comes in on stdin; see also --text, --raw and --file.
    """
    waits = ctx.get_parameter_source("wait") is not click.core.ParameterSource.DEFAULT
    wait: float | None = options.pop("wait")
    if payload is not None and file is not None:
        raise click.UsageError("give PAYLOAD or --file, not both")
    if lines and (id is not None or waits):
        raise click.UsageError(f"--lines makes many tasks, so {'--wait' if waits else '--id'} does not go with it")
    one_of(text=text, raw=raw)
    form: Form = "text" if text else "raw" if raw else "json"
    data = _read(ctx, payload, file)
    if not lines:
        value = _encode(data, form, "the payload", quoted=payload not in (None, "-"))
        return ask(ctx, lambda nq: _submit_one(ctx, nq, queue, value, id=id, wait=wait, waits=waits, **options))
    if data is None:
        raise click.UsageError("--lines reads a file or stdin: give --file PATH, or - as PAYLOAD")
    values = [
        _encode(line.rstrip(b"\r\n"), form, f"line {number}")
        for number, line in enumerate(data.splitlines(keepends=True), 1)
        if line.strip()
    ]
    return ask(ctx, lambda nq: _submit_all(ctx, nq, queue, values, **options))


async def _submit_one(
    ctx: click.Context, nq: Client, queue: str, value: bytes, *, wait: float | None, waits: bool, **options: Any
) -> Submitted | Value:
    task = await nq.submit(queue, value, **options)
    if not waits:
        return Submitted(queue, [task.id])
    front_of(ctx).say(task.id)
    front_of(ctx).waits_for(task.id)
    return Value(await task.result(wait), task.id, queue)


async def _submit_all(ctx: click.Context, nq: Client, queue: str, values: list[bytes], **options: Any) -> Submitted:
    ids: list[str] = []
    errors: list[NqnbError] = []
    with front_of(ctx).live() as show:
        for start in range(0, len(values), _BATCH):
            batch = values[start : start + _BATCH]
            for outcome in await nq.submit_many(queue, batch, **options, errors="return"):
                if isinstance(outcome, Task):
                    ids.append(outcome.id)
                else:
                    errors.append(outcome)
            show(Progress(start + len(batch), len(values), "tasks submitted"))
    return Submitted(queue, ids, many=True, errors=errors)


def _read(ctx: click.Context, payload: str | None, file: IO[bytes] | None) -> bytes | None:
    try:
        if file is not None:
            return file.read()
        if payload == "-":
            return front_of(ctx).stdin()
    except OSError as error:
        raise click.UsageError(f"the payload cannot be read: {error.strerror}") from None
    try:
        return None if payload is None else payload.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # in a cell any half of a surrogate pair can be written, not only an escaped byte
        raise click.UsageError(
            f"the payload {shown(payload)} is invalid: it holds half of a surrogate pair. Drop or replace it."
        ) from None


def _encode(data: bytes | None, form: Form, what: str, *, quoted: bool = False) -> bytes:
    """The payload to send; what is ``quoted`` came through a shell, which may have taken its quotes away."""
    if data is None:
        return b"null"
    if form == "raw":
        return data
    if form == "text":
        try:
            return json.dumps(data.decode("utf-8"), ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{what} is not UTF-8 text ({error}); --raw sends bytes as they are") from None
    if not data.strip():
        raise click.UsageError(f"{what} is empty, which is not JSON; write null, or use --text for empty text")
    try:
        payloads.decode_json(data)
    except BadInput as error:
        start = data[:40].decode("utf-8", "replace")
        raise click.UsageError(
            f"{what}, {start!r}{'…' if len(data) > 40 else ''}, is not JSON ({error}); "
            f"{_QUOTE if quoted else ''}use --text for plain text, --raw for bytes"
        ) from None
    return data.strip()
