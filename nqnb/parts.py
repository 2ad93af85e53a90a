"""The parts of a nested value, each with where it stands: how an error finds the one that it is about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from nqnb.inputs import shown

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
