"""Splits the line of a magic into words as a shell does, except that JSON does not need quotes."""

from __future__ import annotations

import io
import json
import os
import shlex

from nqnb.errors import BadInput

_DECODER = json.JSONDecoder()


def words(line: str, *, windows: bool = os.name == "nt") -> list[str]:
    """Return the words of a line.

    Quotes group words and are removed. A backslash escapes the next character. Variables, braces and ``*`` are not
    expanded. A JSON object or array does not need quotes.

    Args:
        line: the text after ``%nq``.
        windows: whether a backslash is an ordinary character, as in Windows paths.

    Raises:
        BadInput: a quote is not closed.
    """
    found = []
    rest = line.lstrip()
    while rest:
        end = _json_end(rest)
        if end:
            word, rest = rest[:end], rest[end:]
        else:
            word, rest = _shell_word(rest, windows=windows)
        found.append(word)
        rest = rest.lstrip()
    return found


def words_to_complete(text: str, *, windows: bool = os.name == "nt") -> tuple[list[str], str]:
    """Return the complete words of a line, and the possibly empty word at its end that is still being typed."""
    for closing_quote in ("", "'", '"'):
        try:
            found = words(text + closing_quote, windows=windows)
        except BadInput:
            continue
        if not closing_quote and (not text or text[-1].isspace()):
            return found, ""
        return found[:-1], found[-1] if found else ""
    return [], ""


def _json_end(text: str) -> int:
    """Return the length of the JSON object or array at the start of a string, or 0 if there is no JSON."""
    if text[0] not in "{[":
        return 0
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if end == len(text) or text[end].isspace() else 0


def _shell_word(text: str, *, windows: bool) -> tuple[str, str]:
    """Return the first word of a string, and the rest."""
    stream = io.StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if windows:
        lexer.escape = ""
    try:
        word = lexer.get_token()
    except ValueError:
        raise BadInput(
            f"cannot parse the line: a quote is not closed in {text.strip()}. Add the closing quote, or escape it."
        ) from None
    return word or "", text[stream.tell() :]
