"""The values of Python variables, which replace `$name` and `$name.attribute` in a magic line."""

from __future__ import annotations

import json
from datetime import date, timedelta
from typing import Any

from nqnb.client import Task
from nqnb.error_text import exact_text, shown
from nqnb.errors import BadInput
from nqnb.notebook.tasks import SessionTask, ids_of
from nqnb.payload import encode_json
from nqnb.records import CancelReceipt, TaskInfo

_TASKS = (SessionTask, Task, TaskInfo, CancelReceipt)
_COMMANDS_WITH_PAYLOADS = ("submit", "schedule")


class VariableText(str):
    """A variable's value as text. ``submit`` and ``schedule add`` send the value itself as JSON."""

    value: Any

    def __new__(cls, text: str, value: Any) -> VariableText:
        """Create a string from ``text``, and store ``value`` with it."""
        made = super().__new__(cls, text)
        made.value = value
        return made


def read(shell: Any, name: str, command: str) -> list[str]:
    """Return the words that replace a variable: task ids, or the value as a single word.

    Args:
        shell: the IPython shell that has the variable.
        name: the name of the variable, possibly with attributes.
        command: the command of the line. For ``submit`` and ``schedule``, a list is a payload. For other commands, a
            list is replaced with the ids of its tasks.

    Raises:
        BadInput: the variable is not defined, or its value cannot be converted to text.
    """
    first, *attributes = name.split(".")
    try:
        value = shell.user_ns[first]
        for attribute in attributes:
            value = getattr(value, attribute)
    except (KeyError, AttributeError):
        raise BadInput(
            f"cannot pass ${name}: there is no such variable. Define the variable, or put single quotes around "
            f"${name} to pass it as text."
        ) from None
    if isinstance(value, _TASKS):
        return ids_of(value)
    if isinstance(value, str):
        return [VariableText(exact_text(value), exact_text(value))]
    if isinstance(value, (bytes, bytearray)):
        raise BadInput(
            f"cannot pass ${name}: its value is bytes, not text ({shown(value)}). To submit the bytes, call "
            f"nq.submit(queue, {name})."
        )
    is_list = isinstance(value, (list, tuple, set, frozenset)) or hasattr(value, "index")
    if is_list and command not in _COMMANDS_WITH_PAYLOADS:
        return ids_of(value)
    if isinstance(value, date):
        return [VariableText(value.isoformat(), value)]
    if isinstance(value, timedelta):
        return [VariableText(str(value.total_seconds()), value)]
    text = encode_json(value, f"${name}").decode()
    decoded = json.loads(text)  # a path, a UUID and some other values are JSON strings
    return [VariableText(decoded if isinstance(decoded, str) else text, value)]


def as_json(word: str) -> str:
    """Return the payload for a word: the value of a variable as JSON, or any other word unchanged."""
    return encode_json(word.value).decode() if isinstance(word, VariableText) else word
