"""The parser for magic lines. A line is split into words as in a shell, but JSON does not need quotes."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator

from nqnb.error_text import readable
from nqnb.errors import BadInput

_DECODER = json.JSONDecoder()
_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_VARIABLE = re.compile(rf"\$({_NAME})")
"""A pattern for a word that stands for the value of a Python variable or attribute."""
_BRACES = re.compile(rf"\{{\s*({_NAME})\s*(?:\}}|[\[(!+*/%-].*)")
"""A pattern for a Python expression in braces. Other magics expand such expressions."""

_EXPRESSION = re.compile(rf"\$({_NAME})[\[(+*/%-].*")
"""A pattern for a word that begins like a variable, but is a Python expression."""


def words(
    line: str,
    *,
    windows: bool = os.name == "nt",
    read_variable: Callable[[str, list[str]], list[str]] | None = None,
) -> list[str]:
    """Return the words of a line.

    Quotes group words and are removed. A backslash escapes the next character. A word that begins with ``#`` starts a
    comment. Braces and ``*`` are not expanded. A JSON object or array does not need quotes.

    Args:
        line: the text after ``%nq``.
        windows: whether a backslash is an ordinary character, as in Windows paths.
        read_variable: a function that is called for each word of the form ``$name``. The function receives the name and
            the previous words, and returns the words to insert. By default, such a word is left unchanged.

    Raises:
        BadInput: the line contains an unclosed quote.
    """
    found: list[str] = []
    for written, word in _split(line, windows=windows):
        variable = _VARIABLE.fullmatch(written)
        if variable is not None and read_variable is not None:
            found += read_variable(variable[1], found)
        else:
            found.append(word)
    return found


def expression_hint(line: str, *, windows: bool = os.name == "nt") -> str:
    """Return advice if the line contains a Python expression that is not expanded, or an empty string otherwise.

    Such an expression is in braces, or begins with a variable, as in ``$tasks[:8]``.

    Raises:
        BadInput: the line contains an unclosed quote.
    """
    for written, word in _split(line, windows=windows):
        if (expression := _EXPRESSION.fullmatch(written)) is not None:
            return (
                f"%nq expands only $name and $name.attribute, not {expression[0]}: assign the value to a variable, and "
                "write $NAME to pass it."
            )
        braces = None if _is_json(word) else _BRACES.search(written)
        if braces is None:
            continue
        if braces[0] == f"{{{braces[1]}}}":
            return f"%nq does not expand {braces[0]}: write ${braces[1]} to pass the value of the variable."
        return f"%nq does not expand {braces[0]}: assign the value to a variable, and write $NAME to pass it."
    return ""


def split_json_hint(line: str, *, windows: bool = os.name == "nt") -> str:
    """Return advice if an invalid JSON object or array was split into several words, or an empty string otherwise.

    Raises:
        BadInput: the line contains an unclosed quote.
    """
    pairs = list(itertools.dropwhile(lambda pair: pair[0][0] not in "{[", _split(line, windows=windows)))
    pairs = list(itertools.takewhile(lambda pair: not pair[0].startswith("--"), pairs))
    text = " ".join(written for written, _ in pairs)
    try:
        json.loads(text or "null")
    except json.JSONDecodeError as error:
        if len(pairs) > 1:
            understood = readable(", ".join(word for _, word in pairs))
            return (
                f"{readable(text)} is invalid JSON ({error.msg}, at character {error.pos + 1}), and was split into the "
                f'words {understood}. Write valid JSON, such as {{"n": 2}}, or quote the text.'
            )
    return ""


def words_to_complete(text: str, *, windows: bool = os.name == "nt") -> tuple[list[str], str] | None:
    """Return the complete words of a line, and the incomplete (possibly empty) word at the end of the line.

    Returns:
        The words and the incomplete word, or None if the line ends with a comment.
    """
    for closing_quote in ("", "'", '"'):
        try:
            found = words(text + closing_quote, windows=windows)
        except BadInput:
            continue
        if words(f"{text}{closing_quote} x", windows=windows) == found:
            return None
        if not closing_quote and (not text or text[-1].isspace()):
            return found, ""
        return found[:-1], found[-1] if found else ""
    return [], ""


def _split(line: str, *, windows: bool) -> Iterator[tuple[str, str]]:
    """Yield each word of a line as a pair: the word as typed, and the word without quotes. Stop at a comment."""
    rest = line.lstrip()
    while rest and not rest.startswith("#"):
        end = _json_end(rest)
        word, after = (rest[:end], rest[end:]) if end else _shell_word(rest, windows=windows)
        yield rest[: len(rest) - len(after)].rstrip(), word
        rest = after.lstrip()


def _json_end(text: str) -> int:
    """Return the length of the JSON object or array at the start of a string, or 0 if there is no JSON."""
    if text[0] not in "{[":
        return 0
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return 0
    return end if end == len(text) or text[end].isspace() else 0


def _is_json(word: str) -> bool:
    try:
        json.loads(word)
    except (ValueError, RecursionError):
        return False
    return True


def _shell_word(text: str, *, windows: bool) -> tuple[str, str]:
    """Return the first word of a string, and the rest of the string."""
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
            f"cannot parse the line: `{readable(text.strip(), 200)}` contains an unclosed quote. "
            "Close the quote, or escape it if it is a literal character."
        ) from None
    return word or "", text[stream.tell() :]
