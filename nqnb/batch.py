"""Submit the items of an iterable, or the rows of a DataFrame, as tasks with the same options.

Each task of a group stores the name of the group, the position of its payload and the label of its row. The tasks can
therefore be found later, and matched with their rows.
"""

from __future__ import annotations

import itertools
import numbers
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from nqnb import payload
from nqnb.error_text import exact_text, shown
from nqnb.errors import BadInput
from nqnb.inputs import Moment, check_callable, check_choice
from nqnb.protocol import names
from nqnb.protocol.keyed import Keyed, submit_keyed
from nqnb.protocol.submit import Payloads, Timeout, make_message, submit
from nqnb.protocol.wire import LONGEST_NAME, Meta, Source, TaskMessage
from nqnb.queue_limits import check_serial

if TYPE_CHECKING:
    from nqnb.jetstream.backend import Backend

IfExists = Literal["attach", "replace", "error"]
"""How a submission handles a key that already belongs to a task."""
UNPAIRED = re.compile("[\ud800-\udfff]")
"""A pattern for surrogates, which UTF-8 cannot encode."""


class Item(NamedTuple):
    """A payload with its position in the batch, and the label of its DataFrame row (or None).

    ``key`` and ``serial`` are the task's key and serial key, or empty strings.
    """

    position: int
    payload: Any
    label: Any = None
    key: str = ""
    serial: str = ""


class Batch:
    """The payloads and options of one call that submits tasks.

    Args:
        queue: the queue.
        payloads: the payloads, or a DataFrame.
        id: the task id, or None to generate one. An id is allowed only if there is a single payload.
        group: the name of the group of tasks, or None.
        key: a function that returns the key of a payload. If None, the tasks have no keys.
        if_exists: what to do if a task with the same key already exists: ``"attach"``, ``"replace"`` or ``"error"``.
        serial: the serial key of all tasks, or a function that returns the serial key of a payload. In both cases, None
            means that there is no serial key.
        source: the notebook and the cell that submit the tasks, or None.
        retry, timeout, deadline, process_at: the options of `nqnb.Client.submit`.

    Attributes:
        queue: the name of the queue.
        payloads: the payloads. ``payloads.error`` is the error that the iterable or a key function raised, or None.
        index: the index of the DataFrame, or None.

    Raises:
        BadInput: an argument is invalid.
    """

    def __init__(
        self,
        queue: str,
        payloads: Any,
        *,
        id: str | None = None,
        group: str | None = None,
        key: Callable[[Any], object] | None = None,
        if_exists: str = "attach",
        serial: str | Callable[[Any], str | None] | None = None,
        source: Source | None = None,
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
        self._template = make_message(queue, b"", id=id, **self._options)
        self._source = source
        self._id = None if id is None else self._template.ID
        self._key = check_callable("key", key, "a function of the payload", 1)
        self._if_exists = check_choice("if_exists", if_exists, ("attach", "replace", "error"))
        if key is not None and id is not None:
            raise BadInput(
                f"id={shown(id)} is invalid: the id of a task with a key is derived from the key. Omit id or key."
            )
        self._serial = "" if serial is None or callable(serial) else check_serial(serial)
        self._serial_of = check_callable("serial", serial, "a string or a function", 1) if callable(serial) else None
        self._group = None if group is None else check_group(group)
        self._plain = key is None and serial is None and group is None and source is None
        """Whether the messages are sent without the field Meta."""
        self.queue = self._template.Queue
        self.payloads = Payloads(payloads)
        self.index: Any = payloads.index if payload.is_frame(payloads) else None
        if self._group is not None and self.index is not None and not self.index.is_unique:
            label = self.index[self.index.duplicated()].tolist()[0]
            raise BadInput(
                f"the payloads are invalid: the label {shown(label)} occurs more than once in the index of the "
                f"DataFrame, so the tasks of group {self._group!r} could not be matched with their rows. "
                "Pass `df.reset_index(drop=True)`."
            )

    def __iter__(self) -> Iterator[Item]:
        """Yield the items. If the iterable or a key function raises, store the error in ``payloads.error`` and stop."""
        labels = itertools.repeat(None) if self.index is None else self.index
        drawn = (Item(position, *pair) for position, pair in enumerate(zip(self.payloads, labels, strict=False)))
        return drawn if self._key is None and self._serial_of is None else self._with_keys(drawn)

    def only(self) -> Item:
        """Return the single item of the batch. Raise `BadInput` if the batch is empty or the item's key is invalid."""
        item = next(iter(self), None)
        if item is None:
            raise self.payloads.error or BadInput(
                "the payloads are invalid: the list is empty. Pass at least one payload."
            )
        return item

    async def submit(self, backend: Backend, client: str, item: Item) -> Keyed:
        """Submit an item. See `nqnb.Client.submit` for the errors.

        Args:
            backend: the backend to use.
            client: the name of the client, which is stored in the task's entry.
            item: the item to submit.

        Returns:
            The id of the task, and whether a task with the same key already existed.
        """
        if self._counted:
            # A timedelta is relative to the time at which the task is submitted.
            await backend.read_now()
        message = self._message(backend, item)
        if not self._plain:
            if self._serial or item.serial:
                await backend.ensure_limits()
            message = msgspec.structs.replace(message, Meta=self._meta(item))
            if item.key:
                return await submit_keyed(backend, message, client, item.key, self._if_exists)
        await submit(backend, message, client, chosen=self._id is not None)
        return Keyed(message.ID, False)

    def _with_keys(self, items: Iterator[Item]) -> Iterator[Item]:
        seen: set[str] = set()
        try:
            for item in items:
                if self._serial_of is not None and (serial := self._serial_of(item.payload)) is not None:
                    item = item._replace(serial=check_serial(serial))
                if self._key is None:
                    yield item
                    continue
                key = check_key(self._key(item.payload))
                if key in seen:
                    raise BadInput(
                        f"key={shown(key)} is invalid: two payloads have this key. Use a different key for each "
                        "payload."
                    )
                if self._if_exists != "attach":
                    seen.add(key)
                yield item._replace(key=key)
        except Exception as error:  # noqa: BLE001  the caller's function may raise anything
            self.payloads.error = error

    def _message(self, backend: Backend, item: Item) -> TaskMessage:
        if self._counted:
            return make_message(self.queue, item.payload, id=self._id, **self._options, now=backend.latest_now())
        # The options have already been checked, so only the id and the payload differ between tasks.
        value = payload.encode(item.payload)
        return msgspec.structs.replace(self._template, ID=self._id or names.new_task_id(), Payload=value)

    def _meta(self, item: Item) -> Meta:
        meta = Meta(source=self._source, key=item.key[:LONGEST_NAME], serial=item.serial or self._serial)
        if self._group is not None:
            label = encode_label(item.label) if self.index is not None else b""
            meta.group, meta.position = self._group, item.position
            meta.label = UNSET if label in (b"", msgspec.json.encode(item.position)) else msgspec.Raw(label)
        return meta


def encode_label(label: Any) -> bytes:
    """Encode a label of a DataFrame's index as JSON. A multi-level label becomes a list."""
    return payload.encode_json(label, "the label of the row")


def check_key(key: object) -> str:
    """Return a key as a string.

    Raise `BadInput` unless the key is a whole number, or a non-empty string without lone surrogates.
    """
    text = exact_text(key) if isinstance(key, str) else None
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        text = str(int(key))
    if not text or UNPAIRED.search(text):
        raise BadInput(
            f"key={shown(key)} is invalid: must be a whole number, or a non-empty string without lone surrogates. "
            "Pass a key such as '2026-11/sweep/7'."
        )
    return text


def check_group(name: object) -> str:
    """Return a group name. Raise `BadInput` unless the name consists of 1 to 200 printable characters."""
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise BadInput(
            f"group={shown(name)} is invalid: expected a string of 1 to {LONGEST_NAME} printable characters. "
            "Pass a name such as 'sweep-7'."
        )
    return exact_text(name)
