"""The docs agree with the tree: links resolve, names exist, Python compiles, and commands parse."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from house_figures import every_import

import nqnb
from nqnb import errors
from nqnb.commands.command_tree import tree
from nqnb.settings import LOGINS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md")),
    *sorted(DOCS.glob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAGIC = re.compile(r"^(?:\w+ = )?%%?(\w+)(.*)$", re.MULTILINE)


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    """Return (page, code) of each code block in one of the languages."""
    for name, text in TEXTS.items():
        for language, code in CODE_BLOCK.findall(text):
            if language in languages:
                yield name, code


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return CODE_BLOCK.sub("", text)


def spans() -> Iterator[tuple[str, str]]:
    """Return (page, code) of each piece of code within a sentence."""
    for name, text in TEXTS.items():
        for code in re.findall(r"`([^`\n]+)`", prose(text)):
            yield name, code


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_the_links_of_a_page_resolve(name: str) -> None:
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if re.match(r"https://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (here / path).resolve() if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_links_to_every_page() -> None:
    linked = set(re.findall(r"\(docs/([\w-]+\.md)\)", TEXTS["README.md"]))
    assert linked == {path.name for path in DOCS.glob("*.md")}


def test_python_of_the_docs_compiles() -> None:
    checked = 0
    for name, code in blocks("python"):
        # A notebook's cell: its magics are not Python.
        plain = MAGIC.sub("pass", code)
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compile(plain, name, "exec", flags=flags | ast.PyCF_ONLY_AST)
        checked += 1
    assert checked >= 6


def test_names_of_nqnb_in_python_of_the_docs_are_public() -> None:
    for name, code in blocks("python"):
        for used in re.findall(r"\bnqnb\.(\w+)", code):
            assert used in nqnb.__all__ or used == "testing", (name, used)


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Return (page, arguments) of each nqnb command and each ``%nq`` magic in code blocks."""
    for name, code in blocks("sh"):
        for line in re.sub(r"(^|\s)#.*$", "", code.replace("\\\n", " "), flags=re.MULTILINE).splitlines():
            for part in re.split(r"&&|\|(?!\|)", line.replace('"$(', "; ").replace(')"', "")):
                for piece in part.split(";"):
                    words = shlex.split(piece, comments=True)
                    if words and words[0].endswith("nqnb"):
                        yield name, words[1:]
    for name, code in blocks("python"):
        for magic, rest in MAGIC.findall(code):
            if magic == "nq":
                yield name, shlex.split(rest, comments=True)


def commands_in_sentences() -> Iterator[tuple[str, list[str]]]:
    """Return (page, arguments) of each nqnb command within a sentence, which may lack arguments."""
    for name, code in spans():
        if code.startswith("nqnb ") and not code.startswith("nqnb COMMAND"):
            yield name, shlex.split(code)[1:]


def parse(arguments: list[str], *, whole: bool) -> None:
    """Parse a command line as the shell does, without running it.

    Args:
        arguments: the command line after ``nqnb``.
        whole: also convert the values, and require every argument.

    Raises:
        click.UsageError: no such command or option, or an invalid value.
    """
    command: click.Command = tree
    context = tree.context_class(tree, info_name="nqnb", **tree.context_settings)
    while isinstance(command, click.Group):
        # Options in front of the command's name belong to the group.
        _, arguments, _ = command.make_parser(context).parse_args(list(arguments))
        if not arguments:
            return
        found = command.get_command(context, arguments[0])
        if found is None:
            raise click.UsageError(f"no command {arguments[0]!r}")
        command, arguments = found, arguments[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    if whole:
        command.make_context(command.name, list(arguments), parent=context.parent)
    else:
        command.make_parser(context).parse_args(list(arguments))


NOTEBOOK_ONLY = {"nest", "down", "handler"}
"""Magics that the shell does not have."""


@pytest.mark.parametrize(("lines", "whole", "least"), [(command_lines, True, 20), (commands_in_sentences, False, 20)])
def test_commands_of_the_docs_parse(
    lines: Callable[[], Iterator[tuple[str, list[str]]]], whole: bool, least: int
) -> None:
    found = [(name, arguments) for name, arguments in lines() if not {*arguments[:1]} & NOTEBOOK_ONLY]
    for name, arguments in found:
        try:
            parse(arguments, whole=whole)
        except click.UsageError as error:
            pytest.fail(f"{name}: nqnb {shlex.join(arguments)}: {error.format_message()}")
    assert len(found) >= least


@pytest.mark.parametrize(
    "wrong",
    ["quueue", "queue purge resize --yess", "task cancell ID", "queue purge", "prune --older-than soon", "submit a/b"],
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        parse(shlex.split(wrong), whole=True)


def broken_variants() -> set[str]:
    """Return the names of the explorer's broken variants: members of ``Broken``, and keys of ``VARIANTS``."""
    names: set[str] = set()
    for path in (ROOT / "tests" / "model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == "Broken":
                assigned = [each.targets[0] for each in node.body if isinstance(each, ast.Assign)]
                names |= {target.id for target in assigned if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS":
                assert isinstance(node.value, ast.Dict)
                names |= {str(ast.literal_eval(key)) for key in node.value.keys if key is not None}
    return names - {"NOTHING"}


def defined_in(path: Path) -> set[str]:
    """Return the functions and classes of a file, as pytest names them."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{each.name}" for each in node.body if hasattr(each, "name")}
    return names


def test_files_and_tests_that_the_docs_name_exist() -> None:
    checked = 0
    for name, code in spans():
        if not re.fullmatch(r"(nqnb|tests|notebooks|examples|docs|\.ci|\.github)/[\w./-]*(::[\w:]+)?", code):
            continue
        path, _, inside = code.partition("::")
        assert (ROOT / path).exists(), (name, code)
        assert not inside or inside in defined_in(ROOT / path), (name, code)
        checked += 1
    assert checked >= 50


def test_modules_and_functions_that_the_docs_name_exist() -> None:
    checked = 0
    for name, code in spans():
        if not re.fullmatch(r"nqnb(\.\w+)+", code):
            continue
        parts = code.split(".")
        thing: object = nqnb
        for end, part in enumerate(parts[1:], 2):
            if not hasattr(thing, part):
                importlib.import_module(".".join(parts[:end]))
            thing = getattr(thing, part)
            assert thing is not None, (name, code)
        checked += 1
    assert checked >= 10


def test_every_metric_is_in_the_docs() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nqnb" / "metrics").glob("*.py"))
    kinds = re.findall(r"\b(gauge|counter|durations)\(\s*\"(nqnb_\w+)\"", code)
    made = {name + ("_total" if kind == "counter" else "") for kind, name in kinds}
    rows = [line for line in TEXTS["docs/operating.md"].splitlines() if line.startswith("| `nqnb_")]
    assert {name for row in rows for name in re.findall(r"`(nqnb_\w+)", row)} == made
    assert len(made) > 25


def steps_of_the_protocol() -> list[list[str]]:
    """Return (step, reason, test, broken variant) of each row of the tables of docs/protocol.md."""
    lines = [line.strip()[1:-1] for line in TEXTS["docs/protocol.md"].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if row[0] != "step" and not row[0].startswith("---")]


def test_broken_variants_of_the_protocol_are_those_of_the_explorer() -> None:
    named = {name for *_, variant in steps_of_the_protocol() for name in re.findall(r"`([^`]+)`", variant)}
    assert named == broken_variants()
    assert len(named) > 40  # as the README says


def test_steps_of_the_protocol_have_a_reason_and_a_test() -> None:
    rows = steps_of_the_protocol()
    assert len(rows) >= 25
    for step, because, test, _ in rows:
        assert step, because
        assert because, step
        assert re.search(r"`tests/[\w/]+\.py", test), step


def test_the_picture_of_the_packages_has_their_imports() -> None:
    (picture,) = (code for name, code in blocks("mermaid") if "flowchart" in code)
    arrows = set(re.findall(r"(\w+)(?:\[.*?\])? --> (\w+)", picture))
    drawn = {room for arrow in arrows for room in arrow}
    imports = {
        (importer.split(".")[1], imported.split(".")[1])
        for _, importer, imported in every_import(ROOT / "nqnb")
        if importer.count(".") and imported.startswith("nqnb.")
    }
    assert arrows <= imports
    below = dict.fromkeys(drawn, frozenset[str]())
    for _ in drawn:
        for upper, lower in arrows:
            below[upper] |= {lower} | below[lower]
    missing = {(upper, lower) for upper, lower in imports if {upper, lower} <= drawn and upper != lower}
    assert {(upper, lower) for upper, lower in missing if lower not in below[upper]} == set()


def test_the_page_of_errors_has_the_tree() -> None:
    (tree_text,) = (code for name, code in blocks("text") if name == "docs/errors.md")
    parents: list[str] = []
    for line in tree_text.splitlines():
        shape = re.match(r"([│├└─ ]*)(\w+)", line)
        assert shape, line
        depth, error = len(shape[1]) // 4, shape[2]
        kind = getattr(errors, error)
        parents[depth:] = [error]
        if depth:
            assert kind.__bases__[0].__name__ == parents[depth - 1], line
    listed = set(re.findall(r"^[│├└─ ]*(\w+)", tree_text, re.MULTILINE))
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, nqnb.NqnbError)}
    assert listed == kinds


def test_the_workflow_has_the_versions_of_the_docs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (servers,) = re.findall(r"server: (\[.*\])", workflow)
    assert json.loads(servers) == re.findall(r"\b2\.\d+\.\d+\b", TEXTS["docs/versions.md"].split("|")[0])
    (pythons,) = re.findall(r"python: (\[.*\])", workflow)
    assert json.loads(pythons) == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_settings_of_the_docs_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`NATS_\w+`|none) \| `(--\w+)` \|$", TEXTS["docs/settings.md"], re.MULTILINE)
    options = {option for parameter in tree.params for option in parameter.opts}
    assert {field for field, _, _ in rows} >= {"url", "tls_first", *itertools.chain(*LOGINS)}
    for field, _, option in rows:
        assert field in nqnb.Settings.__dataclass_fields__
        assert option in options
