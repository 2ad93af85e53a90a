"""Convert JSON to types that nqnb can encode but msgspec cannot decode: paths, and types of numpy and pandas.

This module imports neither numpy nor pandas.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec

from nqnb.error_text import said, shown

_JSON_TYPES = (dict, list, str, int, float, bool, type(None))
_LOCAL_TIME = Annotated[datetime, msgspec.Meta(tz=False)]
_PLAIN_TYPES: dict[str, Any] = {
    "builtins.str": str,
    "builtins.int": int,
    "builtins.float": float,
    "datetime.datetime": datetime,
    "datetime.timedelta": timedelta,
    "numpy.bool": bool,
    "numpy.bool_": bool,
    "numpy.integer": int,
    "numpy.floating": float,
    "numpy.datetime64": _LOCAL_TIME,
    "numpy.timedelta64": timedelta,
    "numpy.ndarray": list,
}
"""A map from the full name of a class to a type. Instances of the class and its subclasses are created from a value of
this type."""


def from_json(kind: Any, value: Any) -> Any:
    """Convert a decoded value to an annotated type that msgspec does not know. msgspec calls this function.

    Args:
        kind: the annotated type.
        value: the decoded JSON value.

    Returns:
        An instance of the type. If nqnb does not know the type either, the value is returned unchanged. msgspec then
        accepts the value only if it is an instance of the type, such as an int for ``numbers.Number``.

    Raises:
        ValueError: the value cannot be converted.
    """
    own = _class_of(kind)
    plain = _plain_type(own)
    if plain is None:
        return value
    try:
        return _created(own, kind, value, msgspec.convert(value, plain))
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None  # msgspec names the invalid part only for a ValueError
    except Exception as error:  # noqa: BLE001  a constructor may raise anything
        raise ValueError(f"{own.__qualname__} cannot be created from {shown(value)}: {said(error)}") from None


def undecodable(kind: Any) -> type | None:
    """Return a class that makes an annotated type impossible to decode from JSON, or None if the type can be decoded.

    Args:
        kind: the annotated type. msgspec must be able to create a decoder for this type.
    """
    try:
        info = msgspec.inspect.type_info(kind)
    except Exception:  # noqa: BLE001  msgspec can create a decoder, so accept the type
        return None
    return _undecodable(info, set())


def _undecodable(info: msgspec.inspect.Type, seen: set[int]) -> type | None:
    if id(info) in seen:  # a class with a field of its own type
        return None
    seen.add(id(info))
    if isinstance(info, msgspec.inspect.CustomType):
        return None if _plain_type(info.cls) or _is_json(info.cls) else info.cls
    if isinstance(info, msgspec.inspect.UnionType):
        found = [_undecodable(part, seen) for part in info.types]
        return found[0] if all(found) else None
    return next(filter(None, (_undecodable(part, seen) for part in _parts(info))), None)


def _parts(info: Any) -> Iterable[msgspec.inspect.Type]:
    """Return the types that the parts of a value must have, except those of fields that have a default."""
    own = (getattr(info, name, None) for name in ("type", "item_type", "key_type", "value_type"))
    fields = (field.type for field in getattr(info, "fields", ()) if field.required)
    return [*filter(None, own), *getattr(info, "item_types", ()), *fields]


def _is_json(kind: type) -> bool:
    """Return whether decoded JSON can be an instance of a class, such as ``numbers.Number``."""
    try:
        return any(issubclass(each, kind) for each in _JSON_TYPES)
    except TypeError:  # a protocol that cannot be checked
        return False


def _class_of(kind: Any) -> Any:
    return get_origin(kind) or kind


def _plain_type(kind: type) -> Any:
    """Return the type from which an instance of a class is created, or None if nqnb does not know the class."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    found = next((_PLAIN_TYPES[name] for name in names if name in _PLAIN_TYPES), None)
    return str if found is None and issubclass(kind, os.PathLike) else found


def _created(own: Any, kind: Any, value: Any, plain: Any) -> Any:
    """Create an instance of the class ``own`` from a JSON value, or from ``plain``, the value in its plain type."""
    library = own.__module__.partition(".")[0]
    if isinstance(plain, list):
        types = get_args(get_args(kind)[1]) if get_args(kind) else ()
        return sys.modules["numpy"].array(
            value, *(each for each in types if isinstance(each, type) and each is not Any)
        )
    if isinstance(plain, datetime):
        # A plain datetime has no nanoseconds.
        return own(value) if library in ("numpy", "pandas") else own.combine(plain.date(), plain.timetz())
    if isinstance(plain, timedelta) and library != "numpy":
        return own(days=plain.days, seconds=plain.seconds, microseconds=plain.microseconds)
    return Path(plain) if own is os.PathLike else own(plain)
