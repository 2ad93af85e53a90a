"""Parsers for command-line values: task ids, queue names, durations, dates, states and paths."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import click

from nqnb.error_text import shown
from nqnb.errors import BadInput
from nqnb.inputs import LONGEST_SECONDS, State, check_status, read_length
from nqnb.listen_address import THIS_MACHINE, ListenAddress
from nqnb.protocol import names
from nqnb.protocol.recurring import check_schedule_name
from nqnb.protocol.status import Status, Waiting
from nqnb.queue_limits import check_rate, check_serial
from nqnb.worker.fetch_policy import check_queues

OPEN_STATES = (Status.PENDING, Status.PROCESSING)
"""The states of tasks that have not ended and can therefore be cancelled."""
CANCEL_FILTERS: tuple[State, ...] = (*OPEN_STATES, Waiting.SCHEDULED)
"""The states that ``nqnb cancel --status`` accepts."""


_TIME_OF_DAY = re.compile("([01]?[0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?")


class FilePath(click.Path):
    """A parameter type for paths. A path with a character that paths cannot contain causes a usage error."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the value to a path, as `click.Path.convert` does."""
        try:
            return super().convert(value, param, ctx)
        except ValueError:
            self.fail(
                f"path {shown(value)} is invalid: it contains a null character or a lone surrogate. "
                "Remove that character.",
                param,
                ctx,
            )


def task_id(text: str) -> str:
    """Parse a task id."""
    try:
        return names.check_task_id(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def queue_name(text: str) -> str:
    """Parse a queue name."""
    try:
        return names.check_queue(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def schedule_name(text: str) -> str:
    """Parse the name of a schedule."""
    try:
        return check_schedule_name(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def status(text: str) -> State:
    """Parse the name of a state."""
    try:
        return check_status(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def open_status(text: str) -> State:
    """Parse the name of a state in which a task can be cancelled."""
    found = status(text)
    if found.terminal:
        raise click.BadParameter(
            f"{found.label} tasks cannot be cancelled: they have ended. Use pending, scheduled or processing"
        )
    return found


def ended_status(text: str) -> State:
    """Parse the name of a state in which a task can be requeued."""
    found = status(text)
    if not found.terminal:
        raise click.BadParameter(
            f"{found.label} tasks cannot be requeued: they have not ended. Use failed, completed, cancelled or deleted"
        )
    return found


def part_of_error(text: str) -> str:
    """Parse text to search for in error messages. Blank text is refused, because it would match almost every error."""
    if not text.strip():
        raise click.BadParameter(
            f"expected part of an error message, got {text!r}, which would match any error. Use a word from the message"
        )
    return text


class AtLeast(click.IntRange):
    """A parameter type for whole numbers with a minimum value. The error message states the minimum."""

    def __init__(self, least: int) -> None:
        super().__init__(least)
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a whole number."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a whole number of at least {self._least:,}, got {str(value)!r}", param, ctx)


def metrics_address(value: str | ListenAddress) -> ListenAddress:
    """Parse the address on which to serve metrics: ``PORT`` or ``HOST:PORT``."""
    try:
        return ListenAddress.of(value)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def health_address(value: str | ListenAddress) -> ListenAddress:
    """Parse the address on which to serve health checks: ``PORT`` or ``HOST:PORT``."""
    try:
        return ListenAddress.of(value, "health", THIS_MACHINE)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def queue_weights(value: str | Mapping[str, int]) -> Mapping[str, int]:
    """Parse the weights of queues, such as ``high=6,low=1``, or their strict order, such as ``high,low``."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",")]
    if any(sign for _, sign, _ in pairs) and not all(re.fullmatch("[0-9]{1,9}", weight) for _, _, weight in pairs):
        raise click.BadParameter(
            f"expected a whole number as the weight of each queue, got {value!r}. Use weights such as high=6,low=1, or "
            "names such as high,low with the most urgent queue first"
        )
    given = [queue for queue, _, _ in pairs]
    try:
        in_order = check_queues(given)
        return check_queues({queue: int(weight) for queue, _, weight in pairs}) if pairs[0][1] else in_order
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def rate(text: str | float) -> float:
    """Parse a rate, such as ``100/s`` or ``30/m``. A number without a unit means tasks per second."""
    try:
        return check_rate(float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(text)) else text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def serial_key(text: str) -> str:
    """Parse a serial key."""
    try:
        return check_serial(text)
    except BadInput as error:
        raise click.BadParameter(str(error)) from None


def failure_id(text: str) -> str:
    """Parse the id of a failure group."""
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise click.BadParameter(
            f"expected the id of a failure group, got {text!r}. `nqnb task failures` lists the ids in its first column"
        )
    return text


def seconds(text: str | float) -> float:
    """Parse a positive duration, such as ``90``, ``1.5``, ``90s``, ``10m``, ``2h30m`` or ``1d``."""
    length = read_length(str(text))
    if length is None or not 0 < length < LONGEST_SECONDS:
        raise click.BadParameter(
            f"expected a duration, got {text!r}. Use a positive number of seconds, or a value like 90s, 10m or 2h30m"
        )
    return length


def moment(text: str) -> datetime | timedelta:
    """Parse a point in time: a duration from now, a time of day, or an ISO date and time.

    A time of day refers to its next occurrence. A time without a time zone is in local time.
    """
    length = read_length(text.removeprefix("+"))
    if length is not None and length < LONGEST_SECONDS:
        return timedelta(seconds=length)
    if (clock := _TIME_OF_DAY.fullmatch(text)) is not None:
        return _next_time_of_day(int(clock[1]), int(clock[2]), int(clock[3] or 0))
    try:
        # Python 3.10 does not accept "Z" for UTC.
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError:
        raise click.BadParameter(
            f"expected a time, got {text!r}. Use a duration from now (90s, 10m, 2h30m, 1d), a time of day "
            "such as 07:00, or a date and time such as 2030-12-31T18:00 (local) or 2030-12-31T18:00Z"
        ) from None


def future_moment(text: str) -> datetime | timedelta:
    """Parse a point in time that must be in the future."""
    found = moment(text)
    if isinstance(found, datetime) and _unix(found) <= datetime.now().timestamp():
        raise click.BadParameter(
            f"expected a time in the future, got {text!r}. Use a later time, or a duration from now"
        )
    return found


def _next_time_of_day(hour: int, minute: int, second: int) -> datetime:
    """Return the next occurrence of a time of day, in local time."""
    now = datetime.now()
    at = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
    return at if at > now else at + timedelta(days=1)


def _unix(moment: datetime) -> float:
    try:
        return moment.timestamp()
    except (OverflowError, OSError, ValueError):  # year 1 or 9999, in some time zones
        return float("-inf") if moment.year < 1970 else float("inf")
