"""Short, safe text for error messages. Values and errors may come from anywhere, and their methods may raise."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN_CHARACTERS = 60


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the ``repr`` of a value in one short line, or the name of its type if the ``repr`` raises."""
    try:
        text = repr(value)
        text = " ".join(text.split()) if "\n" in text else text
    except Exception:  # noqa: BLE001  the repr of a foreign value may raise anything
        return f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def quoted(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a string of unknown origin as a short literal without control characters."""
    literal = repr(text[: limit + 1])
    return literal if len(text) <= limit else f"{literal[:limit]}… ({len(text)} characters)"


def readable(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a string of unknown origin, cut to ``limit`` characters, with its control characters escaped."""
    short = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in short)


def said(error: BaseException) -> str:
    """Return an error's type and text, or only its type if it has no text or its ``str`` raises."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  as in `shown`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def clause(error: BaseException) -> str:
    """Return an error's message without the final full stop, for use within another message."""
    return str(error).rstrip(". ")


def kind_of(value: object) -> str:
    """Return the name of a value's type for an error message."""
    return "None" if value is None else f"type {type(value).__name__}"


def hint(text: str | None, known: Iterable[str]) -> str:
    """Return "Did you mean …? " if a string resembles a known string, and otherwise an empty string."""
    if not text or len(text) > 200:
        return ""
    import difflib  # imported late: only a misspelled name needs it

    near = difflib.get_close_matches(text, list(known), 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def exact_text(value: str) -> str:
    """Return a string as a plain ``str``. An instance of a subclass (numpy's, an enum) is copied."""
    return value if type(value) is str else str.__str__(value)
