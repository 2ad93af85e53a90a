"""Reads what was typed on a magic's line as a shell would, but for JSON, which arrives as it was typed."""

from __future__ import annotations

import io
import json
import os
import shlex

from nqnb.errors import BadInput

_DECODER = json.JSONDecoder()


def words(line: str, *, windows: bool = os.name == "nt") -> list[str]:
    """The words of a line.

    Quotes group and go, a backslash takes away the meaning of what follows. Nothing is expanded: no ``$``, no braces,
    no ``*``. A JSON object or array may stand without quotes around it.

    Args:
        line: what follows ``%nq``.
        windows: whether a backslash is a character like others, for paths have it.

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
    """The whole words of a line, and the one that its end is in the middle of, which may be empty."""
    for closing in ("", "'", '"'):
        try:
            found = words(text + closing, windows=windows)
        except BadInput:
            continue
        if not closing and (not text or text[-1].isspace()):
            return found, ""
        return found[:-1], found[-1] if found else ""
    return [], ""


def _json_end(text: str) -> int:
    """Where the JSON object or array ends that the text begins with; 0 where there is none."""
    if text[0] not in "{[":
        return 0
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if end == len(text) or text[end].isspace() else 0


def _shell_word(text: str, *, windows: bool) -> tuple[str, str]:
    stream = io.StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if windows:
        lexer.escape = ""
    try:
        word = lexer.get_token()
    except ValueError:
        raise BadInput(f"a quote is not closed in: {text.strip()}") from None
    return word or "", text[stream.tell() :]
