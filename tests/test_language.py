"""The language of the project: no word that readers stumble over, and errors that say what, why and what to do.

The words are searched for in comments, docstrings, other strings and names of functions of every Python file, and in
the text of the docs, the notebooks, the widgets and the configuration. Ruff checks that docstrings are imperative.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import nqnb.errors
from nqnb.errors import NqnbError

ROOT = Path(__file__).parents[1]
SKIPPED_FOLDERS = {
    ".hypothesis",
    ".git",
    ".venv",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "dist",
    "build",
    "site",
    ".cache",
    "screenshots",
}
SUFFIXES = {".py", ".md", ".ipynb", ".js", ".css", ".html", ".toml", ".yml", ".yaml", ""}

BANNED = {
    r"anew": "again, or recreate, reconnect, rebuild",
    r"once more": "again",
    r"for ever": "forever, or without end",
    r"evermore|hitherto|hereby|whence|thence|lest|amiss|aught|nought": "a word of today",
    r"who(m|so)?ever": "name the worker, the client, the user",
    r"somebody|somebody's|nobody's|everybody": "name the worker, the client, the user",
    r"one's": "your, or name the owner",
    r"there (is|are|was|were) none": "not found, missing",
    r"(?<!there )(is|was|are|were) no (?!longer|(more|less|later|earlier|older|larger) than)\w+": "invalid, must be …",
    r"takes no": "expected …, got …; has no parameter …",
    r"does not tell its": "has no …",
    r"let(s|ting)? us|is let|are let|let in|lets in|lets it in": "may, can, accept",
    r"turn(s|ed|ing)? (us|it|them) away|turned away": "refuse",
    r"dear": "slow, expensive",
    r"(throw|throws|threw|thrown|throwing) (it |them |that )?away": "drop, ignore, discard",
    r"pass(es|ed|ing)? (it |them )?over(?! (the|a) (network|socket|wire|pipe))": "ignore, skip",
    r"twice is as once|twice as once": "idempotent",
    r"hand(s|ed|ing)? (it |them |that |this |one |tasks? )?back": "nak, return",
    r"g(ive|ives|ave|iven|iving) (it |them |that )?(out|to another) again|gives? it out": "redeliver",
    r"put(s|ting)? (it |them |that |this |one |tasks? )?back": "nak, redeliver",
    r"(give|gives|gave|given|giving) up as": "mark as",
    r"for certain": "guaranteed",
    r"a text": "a string",
    r"the latest word|last word": "the latest update",
    r"need(s)? not be told|be told of|(is|are|was|were) told of": "is notified of",
    r"is without (it|one|them)": "has no",
    r"of a kind|the like|and such like": "name it",
    r"a good many|a great many|ever so": "many",
    r"(, |; )for (it|there|they|he|she|that|this|nothing|then) (?!long)": "because",
    r"as it were|so to speak|so to say": "leave it out",
    r"stands? anew|stands? there|stand there": "exists",
    r"beforehand": "before",
    r"of (whom|which) it is": "whose",
    r"shall|ought": "must, can",
    r"what goes on|goes? on without end": "continue, or name what happens",
    r"by hearsay|of no use|is of use": "is useless, is useful",
    r"comes? to (its|their) end": "end, finish",
}
"""What is not written, as regular expressions between word borders, and what to write instead."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("nqnb/jetstream/bucket_reader.py", "anew"): "the name of an attribute, as in `nqnb.records.TaskBatch`",
    ("nqnb/protocol/interfaces.py", "anew"): "the name of an attribute",
    ("nqnb/records.py", "anew"): "the name of a public attribute",
}
"""(File, text found): the reason why it stays."""

_BANNED = re.compile(
    r"\b(?:" + "|".join(f"(?P<p{number}>{each})" for number, each in enumerate(BANNED)) + r")\b", re.IGNORECASE
)
_SAY = list(BANNED.values())


class Passage(NamedTuple):
    """A piece of prose, and the line of the file on which it begins."""

    line: int
    text: str


def files() -> Iterator[Path]:
    """Return every file of the project that has prose, without the licence and this file."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if SKIPPED_FOLDERS & set(parts) or any(part.endswith(".egg-info") for part in parts):
            continue
        if path.suffix in SUFFIXES and path.is_file() and path.name not in {"LICENSE", Path(__file__).name}:
            yield path


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_passages(source: str) -> Iterator[Passage]:
    """Return the comments (those of adjacent lines as one), the strings, and the names of functions and classes."""
    begin, last = 0, -1
    words: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1 and words:
            yield Passage(begin, " ".join(words))
            words = []
        begin = line if not words else begin
        words.append(token.string.lstrip("#: "))
        last = line
    if words:
        yield Passage(begin, " ".join(words))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Passage(node.lineno, node.value)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Passage(node.lineno, node.name.replace("_", " "))


def passages(path: Path) -> Iterator[Passage]:
    """Return the prose of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_passages(text)
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            yield Passage(0, "".join(cell["source"]))
    else:
        # Paragraphs, since a phrase may be broken over lines.
        line = 1
        for block in re.split(r"(\n\s*\n)", text):
            yield Passage(line, re.sub(r"\n\s*(//|\*|#|<!--)?", "\n ", block))
            line += block.count("\n")


def findings(path: Path) -> Iterator[str]:
    """Return where a file has words that are not written, and what to write instead."""
    for line, text in passages(path):
        flat = re.sub(r"\s+", " ", text)
        for found in _BANNED.finditer(flat):
            if (name_of(path), found[0]) in EXCEPTIONS:
                continue
            say = _SAY[int(str(found.lastgroup)[1:])]
            around = flat[max(0, found.start() - 40) : found.end() + 40]
            yield f"{name_of(path)}:{line}: {found[0]!r} in '…{around}…': write {say}"


ERRORS = {name for name, kind in vars(nqnb.errors).items() if isinstance(kind, type) and issubclass(kind, NqnbError)}
UNADVISED = {
    "task {…} failed: {…}": "the exception of the handler",
}
"""Messages that do not say what to do, and why not. This list only shrinks."""
LABELLED = {"RevisionConflict"}
"""Errors that write their message themselves: their first argument is data."""


def message_of(node: ast.expr) -> str | None:
    """Return the text of a literal message, with ``{…}`` for what is filled in, or None for another expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{…}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = message_of(node.left), message_of(node.right)
        return None if left is None or right is None else left + right
    return None


def lacks(message: str) -> str | None:
    """Return what a message leaves out of ``what failed: why (the value). What to do.``, or None if it is complete.

    Three shorter forms say the same: what is expected instead (``expected …, got …``, ``must be …``) is what to do; a
    first sentence that states the cause needs no colon; and the text of another problem is followed by what to do.
    """
    if re.match(r"\{…\}[.;] \S", message) or re.match(r"[^:]{10,}\. [A-Z`]", message):
        return None
    what, colon, why = message.partition(": ")
    if not colon or not what.strip():
        return "why, after a colon"
    if not re.search(r"[.;] \S|\{…\} [A-Z]|\bexpected\b|\bmust be\b", why):
        return "what to do, after '. ' or '; '"
    return None


@functools.cache
def error_messages() -> tuple[tuple[str, int, str], ...]:
    """Return (file, line, message) of each literal message that an error of the tree is made with."""
    found = []
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "nqnb").rglob("*.py"))}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    errors = set(ERRORS)
    for _ in range(3):  # errors that other modules derive, and those derived from these
        errors |= {node.name for node in classes if {getattr(base, "id", "") for base in node.bases} & errors}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            if called == "__init__" and path.name == "errors.py":  # an error that writes its message itself
                called = "NqnbError"
            if called in errors - LABELLED and (message := message_of(node.args[0])) is not None:
                found.append((name_of(path), node.lineno, message))
    return tuple(found)


def test_no_word_is_used_that_readers_stumble_over() -> None:
    found = [line for path in files() for line in findings(path)]
    assert not found, "\n".join(found)


def test_every_error_says_what_failed_and_why_and_what_to_do() -> None:
    found = [
        f"{name}:{line}: {message!r} lacks {missing}"
        for name, line, message in error_messages()
        if message not in UNADVISED and (missing := lacks(message))
    ]
    assert not found, "\n".join(found)
    assert len(error_messages()) > 150


def test_every_exception_is_used() -> None:
    assert {message for _, _, message in error_messages() if lacks(message)} >= set(UNADVISED)
    for (name, text), reason in EXCEPTIONS.items():
        assert reason
        assert any(text in re.sub(r"\s+", " ", passage.text) for passage in passages(ROOT / name)), (name, text)


@pytest.mark.parametrize("text", ["begins anew", "Whoever asks", "it was handed back", "there is none", "no dear call"])
def test_the_search_finds_what_it_is_for(text: str) -> None:
    source = f'"""Docs.\n\n{text}"""\n'
    assert any(_BANNED.search(passage.text) for passage in python_passages(source))
    assert any(_BANNED.search(passage.text) for passage in python_passages(f"x = 1  # {text}\n"))
    assert any(_BANNED.search(passage.text) for passage in python_passages(f"x = f'{{x}} {text}'\n"))


def test_messages_are_judged_by_their_three_parts() -> None:
    assert lacks("queue name 'a b' is invalid: spaces are not allowed. Use letters.") is None
    assert lacks("the server refused {…}: {…}; ask its operator") is None
    assert lacks("now={…} is invalid: expected a datetime, got {…}.") is None
    assert lacks("the session is closed. Open one with `nqnb.session()`.") is None
    assert lacks("{…}; try again in a moment") is None
    assert lacks("task {…} may be in its queue or not: {…} Ask for its status.") is None
    assert lacks("it failed") == "why, after a colon"
    assert lacks("no room. it failed") == "why, after a colon"
    assert lacks("it failed: no room") == "what to do, after '. ' or '; '"
