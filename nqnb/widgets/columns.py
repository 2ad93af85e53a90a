"""The columns of a live table: the standard columns, and a column for each field of the payloads and results.

A sample of the tasks determines which fields have a column. Outside the sample, a payload or result is decoded only if
the table displays its fields, or sorts or filters by them.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timezone
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from nqnb.decode import MAX_DEPTH, decode, decode_value, depth
from nqnb.error_text import exact_text, kind_of, said, shown
from nqnb.errors import BadInput, MalformedMessage
from nqnb.records import TaskInfo
from nqnb.task_values import decoded, preview, run_time, share
from nqnb.text import line

ValueFormat = str | Callable[[Any], object]
"""A format for values: a string for `str.format`, such as ``"{:,}"``, or a function that returns the text."""

PAYLOAD, RESULT = "payload.", "→ "
"""The prefixes of the column keys for payload fields and result fields. The field name follows the prefix."""
STANDARD = {
    "id": "text",
    "queue": "choice",
    "status": "status",
    "attempt": "number",
    "age": "",
    "run": "number",
    "worker": "choice",
    "progress": "number",
    "payload": "text",
    "error": "text",
    "result": "text",
    "source": "text",
    "group": "text",
}
"""The keys of the standard columns, and the kinds of their filters. Field columns are inserted before ``payload``.
"""
EXTRA = ("error", "result", "source", "group")
"""The standard columns that are shown only if the user or the caller has chosen them."""
_OTHER_NAMES = {"run time": "run", "run_time": "run"}
MAX_FILTER_CHARACTERS = 200
MAX_CHOICES = 50
"""The maximum number of choices in a filter. If a column has more values, its filter searches for text."""
_MOST_NAMES = 1000
"""The maximum number of names that are read from ``columns``, which may be an endless generator."""
_MAX_FIELDS = 50
"""The maximum number of payload fields, and of result fields, from which the user can choose."""
_MAX_NAME_CHARACTERS = 200
"""The maximum length of the name of a field that the user can choose."""
_MAX_DECODED_BYTES = 65_536
"""The maximum size of a payload or result whose fields are decoded."""
_SAMPLED_TASKS, _SAMPLED_BYTES = 100, 500_000
"""The limits of the sample, which is taken before each message to the page."""
_ENTER_SHARE, _STAY_SHARE = 0.5, 0.2
"""The minimum share of the sample in which a field must occur to become a default column, and to stay one."""
_TEXT_CHARACTERS = 200
"""The maximum number of characters of a value in the table."""
_SEARCHED_CHARACTERS = 1000


class TableColumn(NamedTuple):
    """A column that the page can show.

    ``name`` is the heading. ``kind`` is the kind of the filter: ``text``, ``number``, ``choice``, ``status``, or an
    empty string for no filter. ``shown`` is 0 if the column is hidden unless the user chooses it, 1 if it is shown by
    default, and 2 if the caller chose it. ``choices`` lists the choices if ``kind`` is ``choice``.
    """

    key: str
    name: str
    kind: str
    shown: int
    choices: tuple[str, ...] = ()


class Columns:
    """The columns of one table.

    Args:
        columns: the names of the columns to show, in order, or None for a selection that depends on the tasks. A
            name is the name of a standard column (`STANDARD`), the name of a payload field, or ``"→ "`` (or ``"->"``)
            followed by the name of a result field. If a payload field has the same name as a standard column, use
            ``"payload."`` followed by the field name.
        formats: the formats of fields, by column name. A name without a prefix applies to payload fields and result
            fields. The format of the column ``payload`` or ``result`` can be a function, which receives the decoded
            value. If a format raises an exception, the plain value is shown.

    Raises:
        BadInput: a name or a format is invalid.
    """

    def __init__(self, columns: Iterable[str] | None = None, formats: Mapping[str, ValueFormat] | None = None) -> None:
        self.chosen = None if columns is None else _checked_names(columns)
        self._formats = {} if formats is None else _checked_formats(formats)
        self.workers: Mapping[str, str] = {}
        """The readable names of workers, such as ``gpu-3/811``, by worker id."""
        self.clear()

    def clear(self) -> None:
        """Discard the sample. Call this method after removing the tasks."""
        self._payloads, self._results = _Fields(PAYLOAD, 3), _Fields(RESULT, 2)
        self._with_results: deque[TaskInfo] = deque(maxlen=_SAMPLED_TASKS)
        self._worker_ids: set[str] = set()
        self._retried = self._progressed = False
        self._payload_shown = self._stale = True

    def note(self, task: TaskInfo) -> None:
        """Record a changed task. This call does not decode anything."""
        self._stale = True
        if task.worker:
            self._worker_ids.add(task.worker)
        if task.attempt > 1:
            self._retried = True
        if task.progress is not None or task.error is not None:
            self._progressed = True
        if task.result:
            self._with_results.append(task)

    def available(self, tasks: Collection[TaskInfo], queues: Collection[str]) -> list[TableColumn]:
        """Return all columns that the page can show, in their default order.

        Columns that are empty, or that have the same value in each row, are hidden by default.
        """
        if self._stale:
            self._stale = False
            self._sample(tasks)
        defaults = {
            "queue": len(queues) > 1,
            "attempt": self._retried,
            "worker": len(self._worker_ids) > 1,
            "progress": self._progressed,
            "payload": self._payload_shown,
            **dict.fromkeys(EXTRA, False),
        }
        choices = {"queue": queues, "worker": {self.worker(each) for each in self._worker_ids}}
        found = [
            _standard(key, int(defaults.get(key, True)), choices.get(key, ())) for key in STANDARD if key not in EXTRA
        ]
        found[-1:-1] = [*self._payloads.columns(), *self._results.columns()]
        found += [_standard(key, 0, ()) for key in EXTRA]
        return found if self.chosen is None else self._with_chosen(found, self.chosen)

    def texts(self, keys: Iterable[str], task: TaskInfo) -> dict[str, str]:
        """Return a dict that maps each key in ``keys`` to the text of the task in that column.

        A valid payload or result is decoded only once.
        """
        objects: dict[str, dict[str, Any] | None] = {}
        found = {}
        for key in keys:
            prefix, field = _split(key)
            if prefix and prefix not in objects:
                objects[prefix] = _object(_DATA[prefix](task))
            fields = objects.get(prefix)
            # If another field is invalid, the cell shows the value that filters and exports use.
            found[key] = self._text(key, self.getter(key)(task) if fields is None else fields.get(field))
        return found

    def payload(self, task: TaskInfo) -> str:
        """Return the text of the column ``payload``."""
        if "payload" in self._formats:
            return self._text("payload", decoded(task.payload))
        return preview(task.payload, 120)

    def worker(self, worker_id: str) -> str:
        """Return the readable name of a worker, or the worker's id if the name is unknown."""
        return self.workers.get(worker_id, worker_id)

    def getter(self, key: str) -> Callable[[TaskInfo], Any]:
        """Return a function that returns a task's value in a column, or None if the task has no value."""
        prefix, field = _split(key)
        if not prefix:
            return lambda task: self._value(key, task)
        data, read = _DATA[prefix], _reader(field)
        return lambda task: read(data(task))

    def _value(self, key: str, task: TaskInfo) -> Any:
        """Return the value of a standard column, or None."""
        match key:
            case "id" | "queue" | "attempt" | "group":
                return getattr(task, key) or None
            case "run":
                ran = run_time(task, datetime.now(timezone.utc))
                return None if ran is None else ran.total_seconds()
            case "worker":
                return self.worker(task.worker) or None
            case "progress":
                done = share(task.progress)
                return None if done is None else 100 * done
            case "error":
                return task.failure or None
            case "payload":
                if "payload" in self._formats:
                    return decoded(task.payload)
                return preview(task.payload, _SEARCHED_CHARACTERS) or None
            case "result":
                if "result" in self._formats:
                    return decoded(_json_result(task))
                return preview(task.result, _SEARCHED_CHARACTERS) or None
            case "source":
                return str(task.source or "") or None
        return None

    def sort_key(self, key: str) -> Callable[[TaskInfo, datetime], Any]:
        """Return the sort key function of a column. Numbers sort before text, and the case of text is ignored."""

        value_of = self.getter(key)

        def sort_key(task: TaskInfo, now: datetime) -> Any:
            value = value_of(task)
            if value is None:
                return None
            return (0, value, "") if _is_number(value) else (1, 0, _plain(value)[:_TEXT_CHARACTERS].casefold())

        return sort_key

    def matcher(self, key: str, text: str) -> Callable[[TaskInfo], bool]:
        """Return a function that checks whether a task matches the filter ``text`` of a column.

        In a column of numbers, ``text`` is a number, a comparison or a range, such as ``100``, ``<= 5`` or ``10..20``.
        For run times, the numbers in ``text`` can have a unit, as in ``> 2m``. Other values match if they contain
        ``text``. If ``text`` begins with ``=``, they match only if they are equal to the rest of ``text``. Case is
        ignored.
        """
        value_of = self.getter(key)
        holds = number_test(text, seconds=key == "run")
        exact = text.startswith("=")
        words = text.removeprefix("=").strip().casefold()

        def matches(task: TaskInfo) -> bool:
            value = value_of(task)
            if value is None:
                return False
            if holds is not None and _is_number(value):
                return holds(value)
            texts = [_plain(value), *([self._text(key, value)] if key in self._formats else [])]
            return any(words == each.casefold() if exact else words in each.casefold() for each in texts)

        return matches

    def _text(self, key: str, value: Any) -> str:
        if value is None:
            return ""
        form = self._formats.get(key)
        text = None
        if form is not None:
            try:
                text = form.format(value) if isinstance(form, str) else str(form(value))
            except Exception:  # noqa: BLE001  the caller's function may raise anything
                text = None
        return line(_plain(value) if text is None else text, _TEXT_CHARACTERS)

    def _sample(self, tasks: Collection[TaskInfo]) -> None:
        step = max(1, len(tasks) // _SAMPLED_TASKS)
        payloads = _sampled(task.payload for task in islice(tasks, 0, None, step))
        self._payloads.learn(payloads)
        self._results.learn(_sampled(_json_result(task) for task in self._with_results))
        self._payload_shown = (not tasks) or (bool(payloads) and not self._payloads.covers(payloads))

    def _with_chosen(self, found: list[TableColumn], chosen: list[str]) -> list[TableColumn]:
        """Return the columns, starting with those that the caller chose. Only the chosen columns are shown."""
        known = {column.key: column for column in found}
        first = [known.get(key, TableColumn(key, heading(key), "text", 0))._replace(shown=2) for key in chosen]
        return [*first, *(column._replace(shown=0) for column in found if column.key not in chosen)]


class _Fields:
    """The fields of the JSON objects in samples of payloads or results."""

    def __init__(self, prefix: str, most: int) -> None:
        self._prefix = prefix
        self._most = most
        self._kinds: dict[str, str] = {}
        self._default: set[str] = set()

    def learn(self, samples: list[dict[str, Any] | None]) -> None:
        """Learn the columns from JSON objects. Simple fields that most objects have are shown by default."""
        counts: Counter[str] = Counter()
        first: dict[str, Any] = {}
        varied, nested = set(), set()
        for sample in samples:
            for field, value in islice((sample or {}).items(), _MAX_FIELDS):
                if field not in self._kinds:
                    if len(self._kinds) >= _MAX_FIELDS or len(field) > _MAX_NAME_CHARACTERS:
                        continue
                    self._kinds[field] = "number"
                counts[field] += 1
                if value is None:
                    continue
                if isinstance(value, (dict, list)):
                    nested.add(field)
                elif first.setdefault(field, value) != value:
                    varied.add(field)
                if not _is_number(value):
                    self._kinds[field] = "text"
        common = [
            field
            for field, count in counts.items()
            if field not in nested and count >= len(samples) * (_STAY_SHARE if field in self._default else _ENTER_SHARE)
        ]
        if samples:
            common.sort(key=lambda field: (field not in self._default, field not in varied))
            self._default = set(common[: self._most])

    def covers(self, samples: list[dict[str, Any] | None]) -> bool:
        """Return whether the columns that are shown by default contain all data of the samples."""
        return all(sample is not None and sample.keys() <= self._default for sample in samples)

    def columns(self) -> list[TableColumn]:
        """Return the columns in the order in which the fields were first found."""
        return [
            TableColumn(self._prefix + field, heading(self._prefix + field), kind, int(field in self._default))
            for field, kind in self._kinds.items()
        ]


_NUMBER = r"[-+]?(?:\d[\d,_]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "%": 1.0}
_UNIT = r"\s*(ms|s|min|m|h|d|%)?"
_COMPARISON = re.compile(rf"(>=|<=|>|<|=)?\s*({_NUMBER}){_UNIT}")
_RANGE = re.compile(rf"(?:({_NUMBER}){_UNIT})?\s*\.\.\s*(?:({_NUMBER}){_UNIT})?")


def number_test(text: str, *, seconds: bool = False) -> Callable[[float], bool] | None:
    """Return a function that checks whether a number is in a range, or None if ``text`` does not describe a range.

    Args:
        text: a number, a comparison such as ``> 100``, or a range such as ``10..20``, ``10..`` or ``..20``.
        seconds: whether the numbers are durations, which may have a unit, such as ``2m``.
    """

    def number(digits: str | None, unit: str | None, missing: float) -> float:
        if digits is None:
            return missing
        return float(digits.replace(",", "").replace("_", "")) * (_UNITS[unit or ""] if seconds else 1)

    if found := _COMPARISON.fullmatch(text.strip()):
        sign, digits, unit = found.groups()
        if unit and not seconds and unit != "%":
            return None
        limit = number(digits, unit, 0)
        match sign:
            case ">":
                return lambda value: value > limit
            case ">=":
                return lambda value: value >= limit
            case "<":
                return lambda value: value < limit
            case "<=":
                return lambda value: value <= limit
        return lambda value: value == limit
    if (found := _RANGE.fullmatch(text.strip())) and (found[1] or found[3]):
        low, high = number(found[1], found[2], -math.inf), number(found[3], found[4], math.inf)
        return lambda value: low <= value <= high
    return None


def is_key(key: str) -> bool:
    """Return whether a column can have this key."""
    return key in STANDARD or (len(key) <= 1000 and key.startswith((PAYLOAD, RESULT)))


def _standard(key: str, shown_by_default: int, choices: Collection[str]) -> TableColumn:
    kind = STANDARD[key]
    if kind == "choice" and len(choices) > MAX_CHOICES:
        kind, choices = "text", ()
    return TableColumn(key, heading(key), kind, shown_by_default, tuple(sorted(choices)))


def heading(key: str) -> str:
    """Return the heading of a column."""
    return "run time" if key == "run" else line(key.removeprefix(PAYLOAD), 40)


def _key(name: str) -> str:
    """Return the key of the column with the given name."""
    name = _OTHER_NAMES.get(name, name)
    if name.startswith("->"):
        name = RESULT + name[2:].strip()
    return name if is_key(name) else PAYLOAD + name


def _checked_names(columns: Any) -> list[str]:
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise BadInput(
            f"columns={shown(columns)} is invalid: expected a list of names, got {kind_of(columns)}. "
            'Pass a list, such as ["status", "path", "-> bytes"], where "-> bytes" is the field "bytes" of the result.'
        )
    try:
        names = list(islice(columns, _MOST_NAMES))
    except Exception as error:  # noqa: BLE001  a foreign iterable may raise anything
        raise BadInput(f"columns={shown(columns)} cannot be read: {said(error)}. Pass a list of names.") from None
    for name in names:
        if not isinstance(name, str) or not exact_text(name):
            raise BadInput(
                f"columns={shown(columns)} is invalid: each name must be a non-empty string, got {shown(name)}. "
                "Pass the names of columns or fields."
            )
    if not names:
        raise BadInput("columns=[] is invalid: a table needs at least one column. Pass the names of columns, or None.")
    return list(dict.fromkeys(_key(exact_text(name)) for name in names))


def _checked_formats(formats: Any) -> dict[str, ValueFormat]:
    if not isinstance(formats, Mapping):
        raise BadInput(
            f"format={shown(formats)} is invalid: expected a dict, got {kind_of(formats)}. "
            'Pass a dict, such as {"bytes": "{:,}"}.'
        )
    try:
        items = list(formats.items())
    except Exception as error:  # noqa: BLE001  a foreign mapping may raise anything
        raise BadInput(
            f'format={shown(formats)} cannot be read: {said(error)}. Pass a dict, such as {{"bytes": "{{:,}}"}}.'
        ) from None
    found: dict[str, ValueFormat] = {}
    exact: dict[str, ValueFormat] = {}
    for given, form in items:
        if not isinstance(given, str) or not (isinstance(form, str) or callable(form)):
            raise BadInput(
                f"format={shown(formats)} is invalid: {{{shown(given)}: {shown(form)}}} does not map a column name to "
                'a format. A format is a string such as "{:,}", or a function.'
            )
        name = exact_text(given)
        key = _key(name)
        if key in STANDARD and key not in ("payload", "result"):
            raise BadInput(
                f"format={shown(formats)} is invalid: the column {shown(name)} has a fixed format. For a payload field "
                f"of this name, use {shown(PAYLOAD + name)}."
            )
        found[key] = exact[key] = form
        if key == PAYLOAD + name:
            found.setdefault(RESULT + name, form)
    # An explicit name overrides a name without a prefix.
    return {**found, **exact}


def _sampled(encoded: Iterable[bytes]) -> list[dict[str, Any] | None]:
    """Return the fields of each value that is not empty, or None for a value that is not an object."""
    found: list[dict[str, Any] | None] = []
    size = 0
    for data in encoded:
        if data and size < _SAMPLED_BYTES:
            size += len(data) if len(data) <= _MAX_DECODED_BYTES else 0
            found.append(_object(data))
    return found


def _object(data: bytes) -> dict[str, Any] | None:
    """Decode a JSON object, or return None if the data is anything else or too large."""
    if len(data) > _MAX_DECODED_BYTES or not data[:20].lstrip().startswith(b"{"):
        return None
    try:
        value = decode_value(data)
    except MalformedMessage:
        return None
    return value if isinstance(value, dict) else None


@lru_cache(maxsize=256)
def _reader(field: str) -> Callable[[bytes], Any]:
    """Return a function that decodes a single field of an encoded object.

    The function returns None if the data is malformed or too large, or if the field is missing. It also returns None
    if the field's value is an object or a list and the data is nested too deeply.
    """
    try:
        kind = msgspec.defstruct("Field", [("value", Any, None)], rename={"value": field}, gc=False)
    except ValueError:  # msgspec does not support quotes, backslashes or control characters in names
        return lambda data: (_object(data) or {}).get(field)
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)

    def read(data: bytes) -> Any:
        if not data or len(data) > _MAX_DECODED_BYTES:
            return None
        try:
            value = decode(data, decoder, "a field").value
        except MalformedMessage:
            return None
        return None if isinstance(value, (dict, list)) and depth(data) > MAX_DEPTH else value

    return read


def _json_result(task: TaskInfo) -> bytes:
    return b"" if task.result_is_bytes else task.result


_DATA: dict[str, Callable[[TaskInfo], bytes]] = {PAYLOAD: lambda task: task.payload, RESULT: _json_result}


def _split(key: str) -> tuple[str, str]:
    """Return the prefix of a key and the name of the field. The prefix of a standard column is an empty string."""
    for prefix in _DATA:
        if key.startswith(prefix):
            return prefix, key[len(prefix) :]
    return "", key


def _is_number(value: Any) -> bool:
    """Return whether a decoded value is a number. ``true`` and ``false`` do not count as numbers."""
    kind = type(value)
    return kind is int or kind is float


def _plain(value: Any) -> str:
    """Return a decoded value as text: strings unchanged, and other values as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return preview(value, _TEXT_CHARACTERS)
    return msgspec.json.encode(value).decode()
