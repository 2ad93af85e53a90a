"""The documentation site builds without a warning, and its reference is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import nqnb
from nqnb.commands.command_tree import tree
from nqnb.notebook.magics.nq_commands import tree as magics

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings") if find_spec(name) is None]


def commands(command: click.Command, path: str) -> dict[str, click.Command]:
    """Return a command and all its subcommands by path, without hidden ones."""
    found = {path: command}
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            if not below.hidden:
                found |= commands(below, f"{path} {name}")
    return found


def test_the_site_builds_and_its_reference_is_complete(tmp_path: Path) -> None:
    if MISSING and os.environ.get("CI") == "true":
        pytest.fail(f"the site cannot be built without {', '.join(MISSING)}", pytrace=False)
    if MISSING:
        pytest.skip(f"the site cannot be built without {', '.join(MISSING)}")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "mkdocs.yml")]
    built = subprocess.run(
        [*build, "-d", str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {
        path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("site/reference/*/index.html")
    }

    api = "".join(pages.values())
    undocumented = [name for name in nqnb.__all__ if f'.{name}"' not in api]
    assert undocumented == []
    for page, root, name in (("commands", tree, "nqnb"), ("magics", magics, "%nq")):
        for path, command in commands(root, name).items():
            assert f"<code>{path}</code>" in pages[page], path
            for option in command.params:
                if isinstance(option, click.Option) and not option.hidden:
                    assert option.opts[-1] in pages[page], (path, option.opts)

    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {each["location"].partition("#")[0] for each in index["docs"] if "cancel" in each["text"].lower()}
    assert {"", "cancelling/", "client/", "notebooks/02-cancel-anything/", "reference/client/"} <= found
    assert not (ROOT / "site").exists()
