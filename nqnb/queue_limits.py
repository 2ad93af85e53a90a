"""The limits of a queue across all workers, and the validation of limits and serial keys that callers pass.

The limits are stored on the server, so that all workers use the same limits. The modules `nqnb.protocol.rate` and
`nqnb.protocol.slots` enforce the limits.
"""

from __future__ import annotations

import contextlib
import math
import re

import msgspec

from nqnb.decode import decode, malformed
from nqnb.error_text import exact_text, kind_of, shown
from nqnb.errors import BadInput
from nqnb.inputs import check_count, is_numpy_scalar
from nqnb.protocol.wire import LONGEST_NAME
from nqnb.store import Entry

MOST_CONCURRENCY = 1000
"""The maximum concurrency limit of a queue. This number bounds the size of the record that lists the running tasks."""
MOST_RATE = 1_000_000.0
LEAST_RATE = 1 / 86_400
"""The highest and the lowest valid rate, in tasks per second."""
_RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|m|h|d)")
_WHAT = "the limits of a queue"
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The limits of a queue across all of its nqnb workers.

    Attributes:
        rate: the maximum number of tasks that start per second, or 0 for no limit.
        concurrency: the maximum number of tasks that run at the same time, or 0 for no limit.
    """

    rate: float = 0.0
    concurrency: int = 0

    def __str__(self) -> str:
        rate = f"rate {rate_text(self.rate)}" if self.rate else ""
        concurrency = f"concurrency {self.concurrency:,}" if self.concurrency else ""
        return ", ".join(filter(None, (rate, concurrency))) or "no limits"

    def encode(self) -> bytes:
        """Return the limits as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def of_entry(cls, entry: Entry | None) -> QueueLimits | None:
        """Decode the limits of a queue. Return None if the queue has no limits.

        Raises:
            MalformedMessage: the entry is invalid, or a limit is out of range.
        """
        if entry is None:
            return None
        found = decode(entry.value, _limits_decoder, _WHAT)
        rate_is_valid = not found.rate or LEAST_RATE <= found.rate <= MOST_RATE
        if not rate_is_valid or not 0 <= found.concurrency <= MOST_CONCURRENCY:
            raise malformed(_WHAT, "the concurrency or the rate is out of range", entry.value)
        return found if found.rate or found.concurrency else None


_limits_decoder = msgspec.json.Decoder(QueueLimits)


def check_limits(rate: object, concurrency: object) -> QueueLimits:
    """Return the limits from the arguments of `nqnb.Client.limit_queue`.

    Raises:
        BadInput: an argument is invalid.
    """
    return QueueLimits(
        rate=0.0 if rate is None else check_rate(rate),
        concurrency=0
        if concurrency is None
        else check_count("concurrency", concurrency, 1, MOST_CONCURRENCY, "the number of tasks to run at once"),
    )


def check_rate(rate: object) -> float:
    """Convert a rate, such as ``"100/s"``, ``"30/m"`` or ``2.5`` (per second), to tasks per second.

    Raises:
        BadInput: the rate is of another type, cannot be parsed, or is out of range.
    """
    found = _RATE.fullmatch(exact_text(rate)) if isinstance(rate, str) else None
    number: float | None = None
    if found is not None:
        number = float(found[1]) / _UNIT_SECONDS[found[2]]
    elif isinstance(rate, (int, float)) and not isinstance(rate, bool):
        with contextlib.suppress(Exception):  # a user's number may raise anything
            number = float(rate) if abs(rate) < 2**63 else math.inf
    elif is_numpy_scalar(rate, "iuf"):
        number = float(rate)  # type: ignore[arg-type]  # a number of NumPy
    instead = "Pass a rate such as '100/s', '30/m' or '500/h', or a number of tasks per second."
    if number is None:
        what = "it cannot be parsed" if isinstance(rate, str) else f"expected a rate, got {kind_of(rate)}"
        raise BadInput(f"rate={shown(rate)} is invalid: {what}. {instead}")
    if not LEAST_RATE <= number <= MOST_RATE:
        raise BadInput(f"rate={shown(rate)} is invalid: must be from 1/d to {MOST_RATE:,.0f}/s. {instead}")
    return number


def rate_text(rate: float) -> str:
    """Return a rate as text, such as "100/s" or "30/m"."""
    for unit, seconds in _UNIT_SECONDS.items():
        if rate * seconds >= 1 - 1e-9:
            return f"{round(rate * seconds, 6):g}/{unit}"
    return f"{rate * _UNIT_SECONDS['d']:g}/d"


def check_serial(serial: object) -> str:
    """Return a serial key. Raise `BadInput` unless the key consists of 1 to 200 printable characters."""
    if not isinstance(serial, str) or not 1 <= len(serial) <= LONGEST_NAME or not serial.isprintable():
        raise BadInput(
            f"serial={shown(serial)} is invalid: expected a string of 1 to {LONGEST_NAME} printable characters. "
            "Pass a key such as 'customer-7'."
        )
    return exact_text(serial)
