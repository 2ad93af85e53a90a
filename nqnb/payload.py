"""Payloads and results: Python values to JSON and back.

Bytes pass through. Anything else becomes JSON; beyond what JSON has, these encode: dates, times and UUIDs (ISO text),
`decimal.Decimal` (text), paths (text), enums (their value), dataclasses, msgspec Structs, numpy scalars and arrays,
pandas Timestamps. NaN and infinities are refused, since JSON has none and ``null`` would not come back as them.
Nothing is pickled here, and nothing that comes from a queue is unpickled or evaluated.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from nqnb.decode import UNREADABLE
from nqnb.error_text import exact_text, said, shown
from nqnb.errors import BadInput, UnencodableValue


def encode(value: object, name: str = "payload") -> bytes:
    """The bytes that carry a value.

    Args:
        value: what to carry; bytes are taken as they are.
        name: what the value is, for the error.

    Raises:
        UnencodableValue: JSON cannot carry it; the error names the part.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value)
        except Exception as error:  # noqa: BLE001  a released view, or a subclass of a stranger's
            raise UnencodableValue(f"{name} cannot be read as bytes: {said(error)}.", name) from None
    return encode_json(value, name)


def encode_json(value: object, name: str = "result") -> bytes:
    """The JSON of a value; bytes inside become base64.

    Raises:
        UnencodableValue: JSON cannot carry it; the error names the part.
    """
    try:
        data = _encoder.encode(value)
    except Exception as error:  # noqa: BLE001  a value may fail in any way while it is read
        raise _refusal(value, name, error) from None
    # msgspec writes NaN and infinities as null, or as such a key: only these make it worth looking for them.
    if any(sign in data for sign in (b"null", b'"nan"', b'inf"')):
        try:
            bad = next(((part, found) for part, found in walk(value, name) if not_a_number(found)), None)
        except Exception as error:  # noqa: BLE001  as above
            raise _unreadable(name, error) from None
        if bad is not None:
            raise _no_such_number(*bad)
    return data


def decode_json(data: bytes | None, kind: Any = Any) -> Any:
    """The value of JSON bytes, validated as ``kind``; no bytes are None.

    Raises:
        BadInput: not JSON, or not of that kind; the text says where.
    """
    try:
        return msgspec.json.decode(data or b"null", type=kind)
    except UNREADABLE as error:
        raise BadInput(str(error)) from None


def _beyond_json(value: Any) -> Any:
    """What msgspec does not know by itself; numpy and pandas are met by their habits, so neither is imported."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime):
        if not_a_number(value):
            raise TypeError("it is NaT")
        return value.isoformat()
    if isinstance(value, timedelta):
        return timedelta(seconds=value.total_seconds())
    if is_numpy(value):
        # With nanoseconds, numpy itself would give plain numbers.
        moments = value.dtype.kind in "Mm"
        plain = (value.astype(f"{value.dtype.kind}8[us]") if moments else value).tolist()
        if type(plain) is not type(value):
            return plain
    for kind, plain_of in _PLAIN.items():
        if isinstance(value, kind):
            return plain_of(value)
    raise TypeError(f"{type(value).__qualname__} has no JSON form")


_PLAIN: dict[type, Callable[[Any], Any]] = {str: exact_text, int: int.__int__, float: float.__float__}
"""How the plain value of a subclass is read; msgspec takes the types themselves only."""

_encoder = msgspec.json.Encoder(enc_hook=_beyond_json)


def _refusal(value: object, name: str, error: Exception) -> UnencodableValue:
    """The error for the first part, depth first, that does not encode by itself."""
    try:
        return _first_refusal(value, name, error)
    except Exception as another:  # noqa: BLE001  a value may fail in any way while it is looked at, too
        return _unreadable(name, another)


def _unreadable(name: str, error: Exception) -> UnencodableValue:
    return UnencodableValue(
        f"JSON cannot carry {name}: reading it raised {said(error)}. Send plain lists, dicts, text and numbers.", name
    )


def _first_refusal(value: object, name: str, error: Exception) -> UnencodableValue:
    for part, found in walk(value, name):
        if not_a_number(found):
            return _no_such_number(part, found)
        if isinstance(found, Unwalkable):
            return UnencodableValue(f"JSON cannot carry {part}: {found.why}", part)
        if isinstance(found, (Mapping, list, tuple, set, frozenset)):
            continue
        try:
            _encoder.encode(found)
        except Exception:  # noqa: BLE001  as in encode_json
            kind = f"{type(found).__module__}.{type(found).__qualname__}".removeprefix("builtins.")
            return UnencodableValue(f"JSON cannot carry {part} (of type {kind}); {_remedy(found)}", part)
    return UnencodableValue(f"JSON cannot carry {name}: {said(error)}; send plain lists, dicts, text and numbers", name)


def _no_such_number(part: str, found: object) -> UnencodableValue:
    return UnencodableValue(f"{part} is {shown(found)}, which JSON does not have; send None or text in its place", part)


def _remedy(found: object) -> str:
    if hasattr(found, "to_dict") and hasattr(found, "columns"):
        return 'send its .to_dict("records"), or a path to it'
    if isinstance(found, str):
        return "it holds half of a surrogate pair; drop or replace it"
    if hasattr(found, "to_list"):
        return "send its .to_list()"
    return "convert it to text, numbers, lists or dicts, or send bytes of your own"


DEEPEST = 200
"""How deep a value is walked; what is deeper is refused, since nobody would find the part."""
KEY_CHARACTERS = 200
"""At most so many characters of a key are part of a name."""


class Unwalkable(NamedTuple):
    """Stands for a part that cannot be looked into, and why."""

    why: str


def walk(value: Any, part: str) -> Iterator[tuple[str, object]]:
    """Every part of a value with its name, such as ``payload['rows'][3]``; the value itself after its own parts."""
    return _walk(value, part, ())


def _walk(value: Any, part: str, above: tuple[int, ...]) -> Iterator[tuple[str, object]]:
    if id(value) in above:
        yield part, Unwalkable("it contains itself")
        return
    if len(above) >= DEEPEST:
        yield part, Unwalkable(f"it is nested more than {DEEPEST} deep")
        return
    above = (*above, id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, (str, int, float)) or not_a_number(key):
                known = key if not_a_number(key) else Unwalkable("a key must be text or a number")
                yield f"the key {shown(key, KEY_CHARACTERS)} of {part}", known
            yield from _walk(item, f"{part}[{shown(key, KEY_CHARACTERS)}]", above)
    elif isinstance(value, (list, tuple, set, frozenset)) or (is_numpy(value) and value.ndim):
        for index, item in enumerate(value):
            yield from _walk(item, f"{part}[{index}]", above)
    else:
        fields = getattr(value, "__struct_fields__", None) or getattr(value, "__dataclass_fields__", None) or ()
        for field in fields:
            yield from _walk(getattr(value, field), f"{part}.{field}", above)
    yield part, value


def is_numpy(value: object) -> bool:
    """Whether it is a numpy array or scalar, without importing numpy."""
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "dtype") and hasattr(value, "tolist")


def not_a_number(value: Any) -> bool:
    """Whether it is NaN, an infinity, NaT or NA, by whatever library."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if type(value).__name__ in ("NaTType", "NAType"):
        return True
    if isinstance(value, datetime) or (is_numpy(value) and not value.ndim and value.dtype.kind in "fMm"):
        return bool(value != value) or (is_numpy(value) and value.dtype.kind == "f" and not math.isfinite(value))
    return False
