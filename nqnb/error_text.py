"""Convert values and errors to short, safe text for error messages, even if their methods raise exceptions."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN_CHARACTERS = 60


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the ``repr`` of a value on one short line, or the name of the type if the ``repr`` raises an exception."""
    try:
        text = repr(value)
        text = " ".join(text.split()) if "\n" in text else text
    except Exception:  # noqa: BLE001  the repr of a custom value may raise anything
        return f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def quoted(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return an untrusted string as a short string literal, with control characters escaped."""
    literal = repr(text[: limit + 1])
    return literal if len(text) <= limit else f"{literal[:limit]}… ({len(text)} characters)"


def readable(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Truncate an untrusted string to ``limit`` characters, and escape its control characters."""
    short = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in short)


def said(error: BaseException) -> str:
    """Return the type and message of an error, or only the type if the message is empty or cannot be read."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  as in `shown`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def clause(error: BaseException) -> str:
    """Return an error's message without the final full stop, to include it in another message."""
    return str(error).rstrip(". ")


def kind_of(value: object) -> str:
    """Return a description of a value's type, such as ``type int``, or ``None`` if the value is None."""
    return "None" if value is None else f"type {type(value).__name__}"


def hint(text: str | None, known: Iterable[str]) -> str:
    """Return "Did you mean …? " with the most similar known string, or an empty string if no string is similar."""
    if not text or len(text) > 200:
        return ""
    import difflib  # imported late: only a misspelled name needs it

    near = difflib.get_close_matches(text, list(known), 1)
    return f"Did you mean {near[0]!r}? " if near else ""


def exact_text(value: str) -> str:
    """Convert an instance of a subclass of ``str``, such as a numpy string or an enum, to a plain ``str``."""
    return value if type(value) is str else str.__str__(value)
