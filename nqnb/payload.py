"""Encode payloads and results as JSON, and decode them.

Bytes are sent unchanged. Other values are sent as JSON. In addition to JSON's own types, these types can be encoded:
dates and times (as ISO strings), UUIDs, `decimal.Decimal` and paths (as strings), enums (as their values), dataclasses,
attrs objects, msgspec Structs, numpy scalars and arrays, and pandas Timestamps. NaN and infinities are rejected,
because JSON has no such numbers, and ``null`` would be decoded as None. nqnb never pickles a value, and never unpickles
or evaluates data from a queue.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from nqnb.decode import UNREADABLE
from nqnb.error_text import exact_text, said, shown
from nqnb.errors import BadInput, UnencodableValue
from nqnb.json_types import from_json


def encode(value: object, name: str = "payload") -> bytes:
    """Encode a value as bytes.

    Args:
        value: the value. Bytes are returned unchanged.
        name: the name of the value in error messages.

    Raises:
        UnencodableValue: part of the value cannot be encoded as JSON; the error names that part.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value)
        except Exception as error:  # noqa: BLE001  a released view, or a custom subclass
            raise UnencodableValue(
                f"{name} cannot be read as bytes: {said(error)}. Pass bytes, or a value that JSON can represent.", name
            ) from None
    return encode_json(value, name)


def encode_json(value: object, name: str = "result") -> bytes:
    """Encode a value as JSON. Bytes inside the value are encoded as base64. The errors are those of `encode`."""
    try:
        data = _encoder.encode(value)
    except Exception as error:  # noqa: BLE001  reading a custom value may raise any error
        raise _refusal(value, name, error) from None
    # msgspec writes NaN and infinities as null, or as the keys "nan" and "inf", so other data needs no search.
    if any(sign in data for sign in (b"null", b'"nan"', b'inf"')):
        try:
            bad = next(((part, found) for part, found in walk(value, name) if not_a_number(found)), None)
        except Exception as error:  # noqa: BLE001  as above
            raise _unreadable(name, error) from None
        if bad is not None:
            raise _no_such_number(*bad)
    return data


def is_frame(value: object) -> bool:
    """Return whether a value is a DataFrame. This function does not import pandas."""
    return all(hasattr(value, name) for name in ("columns", "index", "iloc", "to_dict")) and not isinstance(value, type)


def frame_rows(frame: Any) -> Iterator[dict[str, Any]]:
    """Return an iterator over the rows of a DataFrame as dicts, in which None replaces NaN, NaT and NA.

    Raises:
        BadInput: a column name is a tuple or is not unique, so the rows would lose values.
    """
    names = list(map(str, frame.columns))
    if any(isinstance(name, tuple) for name in frame.columns):
        raise BadInput(
            "the payloads are invalid: the column names of the DataFrame have several levels. Flatten the column names."
        )
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise BadInput(
            f"the payloads are invalid: two columns of the DataFrame are named {shown(twice)}. Rename one of the "
            f"columns."
        )
    return _rows(frame, names)


def _rows(frame: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(frame), _ROWS_AT_ONCE):
        part = frame.iloc[start : start + _ROWS_AT_ONCE]
        columns = [part.iloc[:, place].tolist() for place in range(len(names))]
        for row in range(len(part)):
            values = (column[row] for column in columns)
            yield {name: None if _is_missing(value) else value for name, value in zip(names, values, strict=True)}


def _is_missing(value: Any) -> bool:
    if type(value).__name__ in ("NaTType", "NAType"):
        return True
    return (isinstance(value, float) or (is_numpy(value) and not value.ndim)) and bool(value != value)


def decode_json(data: bytes | None, kind: Any = Any) -> Any:
    """Decode JSON to a value of type ``kind``. Empty bytes and None are decoded like ``null``.

    Raises:
        BadInput: the bytes are not JSON, or the value is not of type ``kind``. The error names the invalid part.
    """
    try:
        return msgspec.json.decode(data or b"null", type=kind, dec_hook=from_json)
    except UNREADABLE as error:
        raise BadInput(str(error)) from None


def _beyond_json(value: Any) -> Any:
    """Convert a value of a type that msgspec cannot encode. This function imports neither numpy nor pandas."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime):
        if not_a_number(value):
            raise TypeError("NaT cannot be encoded as JSON")
        return value.isoformat()
    if isinstance(value, timedelta):
        return timedelta(seconds=value.total_seconds())
    if is_numpy(value):
        # numpy would return plain numbers for times in nanoseconds.
        moments = value.dtype.kind in "Mm"
        plain = (value.astype(f"{value.dtype.kind}8[us]") if moments else value).tolist()
        if type(plain) is not type(value):
            return plain
    for kind, plain_of in _PLAIN.items():
        if isinstance(value, kind):
            return plain_of(value)
    raise TypeError(f"a value of type {type(value).__qualname__} cannot be encoded as JSON")


_PLAIN: dict[type, Callable[[Any], Any]] = {str: exact_text, int: int.__int__, float: float.__float__}
"""A map from base types to functions that convert an instance of a subclass. msgspec encodes only the base types."""

_encoder = msgspec.json.Encoder(enc_hook=_beyond_json)


def _refusal(value: object, name: str, error: Exception) -> UnencodableValue:
    """Return the error for the first part, in depth-first order, that cannot be encoded as JSON."""
    try:
        return _first_refusal(value, name, error)
    except Exception as another:  # noqa: BLE001  inspecting a custom value may raise any error, too
        return _unreadable(name, another)


def _unreadable(name: str, error: Exception) -> UnencodableValue:
    return UnencodableValue(
        f"{name} cannot be encoded as JSON: reading the value raised {said(error)}. "
        "Send plain lists, dicts, strings and numbers.",
        name,
    )


def _first_refusal(value: object, name: str, error: Exception) -> UnencodableValue:
    for part, found in walk(value, name):
        if not_a_number(found):
            return _no_such_number(part, found)
        if isinstance(found, Unwalkable):
            return UnencodableValue(f"{part} cannot be encoded as JSON: {found.why}. {found.remedy}", part)
        if isinstance(found, (Mapping, list, tuple, set, frozenset)):
            continue
        try:
            _encoder.encode(found)
        except Exception:  # noqa: BLE001  as in encode_json
            kind = f"{type(found).__module__}.{type(found).__qualname__}".removeprefix("builtins.")
            return UnencodableValue(f"{part} cannot be encoded as JSON: it is of type {kind}. {_remedy(found)}", part)
    return UnencodableValue(
        f"{name} cannot be encoded as JSON: {said(error)}. Send plain lists, dicts, strings and numbers.", name
    )


def _no_such_number(part: str, found: object) -> UnencodableValue:
    return UnencodableValue(
        f"{part} cannot be encoded as JSON: it is {shown(found)}. Send None or a string instead.", part
    )


def _remedy(found: object) -> str:
    if hasattr(found, "to_dict") and hasattr(found, "columns"):
        return 'Send the result of .to_dict("records"), or the path of a file with the data.'
    if isinstance(found, str):
        return "Remove or replace the lone surrogate."
    if hasattr(found, "to_list"):
        return "Send the result of .to_list()."
    return "Convert the value to strings, numbers, lists or dicts, or send bytes."


_ROWS_AT_ONCE = 1000
"""The number of rows of a DataFrame that are converted at once."""
MAX_DEPTH = 200
"""The maximum nesting depth of a value."""
KEY_CHARACTERS = 200
"""The maximum length of a key in the name of a part. Longer keys are truncated."""


class Unwalkable(NamedTuple):
    """A part of a value that cannot be traversed, with the reason and a remedy."""

    why: str
    remedy: str


def walk(value: Any, part: str) -> Iterator[tuple[str, object]]:
    """Yield each part of a value and its name, such as ``payload['rows'][3]``. The whole value is yielded last."""
    return _walk(value, part, ())


def _walk(value: Any, part: str, above: tuple[int, ...]) -> Iterator[tuple[str, object]]:
    if id(value) in above:
        yield part, Unwalkable("it contains itself", "Send a value without circular references.")
        return
    if len(above) >= MAX_DEPTH:
        yield part, Unwalkable(f"it is nested more than {MAX_DEPTH} levels deep", "Send a flatter value.")
        return
    above = (*above, id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float)) or not_a_number(key):
                known = (
                    key if not_a_number(key) else Unwalkable("a key must be a string or a number", "Convert the key.")
                )
                yield f"the key {shown(key, KEY_CHARACTERS)} of {part}", known
            yield from _walk(item, f"{part}[{shown(key, KEY_CHARACTERS)}]", above)
    elif isinstance(value, (list, tuple, set, frozenset)) or (is_numpy(value) and value.ndim):
        for index, item in enumerate(value):
            yield from _walk(item, f"{part}[{index}]", above)
    else:
        for field in _field_names(value):
            if hasattr(value, field):  # a field without a value is not encoded
                yield from _walk(getattr(value, field), f"{part}.{field}", above)
    yield part, value


def _field_names(value: object) -> Iterable[str]:
    """Return the names of the encoded fields of a Struct, dataclass or attrs object, or () for any other value."""
    if isinstance(value, msgspec.Struct):
        return value.__struct_fields__
    if dataclasses.is_dataclass(value):
        # The mapping `__dataclass_fields__` also has ClassVar and InitVar annotations, which are not encoded.
        return [field.name for field in dataclasses.fields(value)]
    if not hasattr(type(value), "__attrs_attrs__"):
        return ()
    # msgspec encodes all public attributes of an attrs object, even those that are not fields.
    slots = (name for base in type(value).__mro__ for name in getattr(base, "__slots__", ()))
    return [name for name in dict.fromkeys([*getattr(value, "__dict__", ()), *slots]) if not name.startswith("_")]


def is_numpy(value: object) -> bool:
    """Return whether a value is a numpy array or scalar. This function does not import numpy."""
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype") and hasattr(value, "tolist")


def not_a_number(value: Any) -> bool:
    """Return whether a value is NaN, infinite, NaT or NA, including numpy and pandas values."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if type(value).__name__ in ("NaTType", "NAType"):
        return True
    if isinstance(value, datetime) or (is_numpy(value) and not value.ndim and value.dtype.kind in "fMm"):
        return bool(value != value) or (is_numpy(value) and value.dtype.kind == "f" and not math.isfinite(value))
    return False
