"""Short, safe text for error messages: of values, texts and errors from anywhere, whatever their methods do."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN_CHARACTERS = 60


def shown(value: object, most: int = SHOWN_CHARACTERS) -> str:
    """Return the ``repr`` of a value in one short line, whatever that ``repr`` does."""
    try:
        text = repr(value)
        text = " ".join(text.split()) if "\n" in text else text
    except Exception:  # noqa: BLE001  the value of a stranger: its repr may fail in any way
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def quoted(text: str, most: int = 60) -> str:
    """Text of unknown origin as a short literal without control characters."""
    literal = repr(text[: most + 1])
    return literal if len(text) <= most else f"{literal[:most]}… ({len(text)} characters)"


def said(error: BaseException) -> str:
    """Return an error's type and text, whatever its ``str`` does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  as in `shown`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def kind_of(value: object) -> str:
    """Return the name of a value's type, for an error."""
    return "None" if value is None else f"type {type(value).__name__}"


def hint(text: str | None, known: Iterable[str]) -> str:
    """Return "did you mean …? " for a text that looks like a known one; empty for any other."""
    if not text or len(text) > 200:
        return ""
    import difflib  # only those who misspell need it

    near = difflib.get_close_matches(text, list(known), 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def exact_text(value: str) -> str:
    """Return a ``str`` of exactly that type; subclasses (numpy's, enums) are copied by their characters."""
    return value if type(value) is str else str.__str__(value)
