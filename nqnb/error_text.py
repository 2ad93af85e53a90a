"""Short, safe text for error messages: of values, texts and errors from anywhere, whatever their methods do."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN_CHARACTERS = 60


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the ``repr`` of a value in one short line, whatever that ``repr`` does."""
    try:
        text = repr(value)
        text = " ".join(text.split()) if "\n" in text else text
    except Exception:  # noqa: BLE001  the repr of a foreign value may fail in any way
        return f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def quoted(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a string of unknown origin as a short literal without control characters."""
    literal = repr(text[: limit + 1])
    return literal if len(text) <= limit else f"{literal[:limit]}… ({len(text)} characters)"


def said(error: BaseException) -> str:
    """Return an error's type and text, whatever its ``str`` does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  as in `shown`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def clause(error: BaseException) -> str:
    """Return an error's message without the full stop at its end, to be used within another message."""
    return str(error).rstrip(". ")


def kind_of(value: object) -> str:
    """Return the name of a value's type, for an error."""
    return "None" if value is None else f"type {type(value).__name__}"


def hint(text: str | None, known: Iterable[str]) -> str:
    """Return "Did you mean …? " for a string that resembles a known one, otherwise an empty string."""
    if not text or len(text) > 200:
        return ""
    import difflib  # imported late: only a misspelled name needs it

    near = difflib.get_close_matches(text, list(known), 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def exact_text(value: str) -> str:
    """Return a ``str`` of exactly that type; subclasses (numpy's, enums) are copied by their characters."""
    return value if type(value) is str else str.__str__(value)
