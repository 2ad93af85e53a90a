"""Submits payloads that share their options: the items of an iterable, or the rows of a DataFrame.

Each task of a named group has the name, its position and the label of its row, so that the group can be found again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from nqnb import payload
from nqnb.error_text import exact_text, kind_of, shown
from nqnb.errors import BadInput
from nqnb.inputs import Moment
from nqnb.jetstream.backend import Backend
from nqnb.protocol import names
from nqnb.protocol.submit import Payloads, Timeout, make_message, submit
from nqnb.protocol.wire import LONGEST_NAME, Meta, TaskMessage


class Item(NamedTuple):
    """A payload, its position, and the label of its row in the index of a DataFrame."""

    position: int
    payload: Any
    label: Any = None


class Batch:
    """The payloads and options of one call that submits tasks.

    Args:
        queue: the queue.
        payloads: the payloads, or a DataFrame.
        group: the name of the group of tasks, or None.
        retry, timeout, deadline, process_at: the options of `nqnb.Client.submit`.

    Attributes:
        queue: the name of the queue.
        payloads: the iterator over the payloads, with the error that it raised.
        index: the index of the DataFrame, or None.

    Raises:
        BadInput: an argument is invalid.
    """

    def __init__(
        self,
        queue: str,
        payloads: Any,
        *,
        group: str | None = None,
        retry: int = 0,
        timeout: Timeout = None,
        deadline: Moment = None,
        process_at: Moment = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "retry": retry,
            "timeout": timeout,
            "deadline": deadline,
            "process_at": process_at,
        }
        self._counted = isinstance(deadline, timedelta) or isinstance(process_at, timedelta)
        self._template = make_message(queue, b"", **self._options)
        self._group = None if group is None else check_group(group)
        self.queue = self._template.Queue
        self.payloads = Payloads(payloads)
        self.index: Any = payloads.index if payload.is_frame(payloads) else None
        if self._group is not None and self.index is not None and not self.index.is_unique:
            raise BadInput(
                f"payloads is invalid: the index of the DataFrame has the label "
                f"{shown(self.index[self.index.duplicated()][0])} twice, so that group {self._group!r} could not be "
                "joined with the rows. Pass `df.reset_index(drop=True)`."
            )

    def __iter__(self) -> Iterator[Item]:
        """Draw the payloads. If the iterable raises an error, the iteration ends; ``payloads.error`` is the error."""
        labels = itertools.repeat(None) if self.index is None else self.index
        return (Item(position, *pair) for position, pair in enumerate(zip(self.payloads, labels, strict=False)))

    async def submit(self, backend: Backend, client: str, item: Item) -> str:
        """Submit a payload, and return the id of the task. See `nqnb.Client.submit` for the errors.

        Args:
            backend: the backend to use.
            client: the name of the client, for the entry.
            item: the payload.
        """
        message = await self._message(backend, item)
        if self._group is not None:
            message = msgspec.structs.replace(message, Meta=self._meta(item))
        await submit(backend, message, client, chosen=False)
        return message.ID

    async def _message(self, backend: Backend, item: Item) -> TaskMessage:
        if self._counted:
            # A timedelta is relative to the time at which the task is submitted.
            await backend.read_now()
            return make_message(self.queue, item.payload, **self._options, now=backend.latest_now())
        # The options have already been checked, so each task only needs its payload.
        value = payload.encode(item.payload)
        return msgspec.structs.replace(self._template, ID=names.new_task_id(), Payload=value)

    def _meta(self, item: Item) -> Meta:
        label = encode_label(item.label) if self.index is not None else b""
        same = label in (b"", msgspec.json.encode(item.position))
        return Meta(group=self._group or "", position=item.position, label=UNSET if same else msgspec.Raw(label))


def encode_label(label: Any) -> bytes:
    """Return a label of a DataFrame's index as JSON. A label of several levels becomes a list."""
    return payload.encode_json(label, "the label of the row")


def check_group(name: object) -> str:
    """Return the name of a group, or raise `BadInput` if it is not 1 to 200 printable characters."""
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise BadInput(
            f"group={shown(name)} is invalid: expected 1 to {LONGEST_NAME} printable characters, got {kind_of(name)}. "
            "Pass a name such as 'sweep-7'."
        )
    return exact_text(name)
