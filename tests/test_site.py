"""The documentation site builds without a warning, and its reference is complete."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from browser import labs

import nqnb
from nqnb.commands.command_tree import tree
from nqnb.notebook.magics.nq_commands import tree as magics

ROOT = Path(__file__).parents[1]
MISSING = [name for name in ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings", "mmdr") if find_spec(name) is None]


def commands(command: click.Command, path: str) -> dict[str, click.Command]:
    """Return a command and all its subcommands by path, without hidden ones."""
    found = {path: command}
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            if not below.hidden:
                found |= commands(below, f"{path} {name}")
    return found


def searched(site: Path, word: str) -> list[str]:
    """Return the titles that the search of the site finds in Chromium, without a network."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with labs.chromium() as browser:
            page = browser.new_page()
            asked: list[str] = []
            here = f"http://127.0.0.1:{server.server_port}/"
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{here}architecture/")
            page.keyboard.press("/")
            page.keyboard.type(word)
            titles = page.locator(".md-search-result__item h1")
            titles.first.wait_for(timeout=30_000)
            assert [url for url in asked if not url.startswith((here, "data:", "blob:"))] == []
            found = [title.strip() for title in titles.all_inner_texts()]
        server.shutdown()
    return found


def broken_links(site: Path) -> list[tuple[str, str]]:
    """Return (page, link) of each link to a file that is not part of the site. MkDocs does not check notebooks."""
    return [
        (page.parent.name, link)
        for page in site.rglob("index.html")
        for link in re.findall(r'(?:href|src)="([^":#?]+)["#?]', page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]


def test_the_site_builds_and_its_reference_is_complete(tmp_path: Path) -> None:
    if MISSING and os.environ.get("CI") == "true":
        pytest.fail(f"the site cannot be built without {', '.join(MISSING)}", pytrace=False)
    if MISSING:
        pytest.skip(f"the site cannot be built without {', '.join(MISSING)}")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml")]  # -q hides warnings
    built = subprocess.run(
        [*build, "-d", str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert broken_links(tmp_path / "site") == []
    pages = {
        path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("site/reference/*/index.html")
    }

    api = "".join(pages.values())
    undocumented = [name for name in nqnb.__all__ if f'.{name}"' not in api]
    assert undocumented == []
    for page, root, name in (("commands", tree, "nqnb"), ("magics", magics, "%nq")):
        assert "<td></td>" not in pages[page]  # an option without a meaning
        assert r"\|" not in pages[page]
        sections = {html.partition("</code>")[0]: html for html in re.split(r"<h2[^>]*><code>", pages[page])}
        for path, command in commands(root, name).items():
            assert path in sections, path
            for option in command.params:
                if isinstance(option, click.Option) and not option.hidden:
                    row = rf"<code>(-\w, )?{max(option.opts, key=len)}\b"
                    assert re.search(row, sections[path]), (path, option.opts)

    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {each["location"].partition("#")[0] for each in index["docs"] if "cancel" in each["text"].lower()}
    assert {"", "cancelling/", "client/", "notebooks/02-cancel-anything/", "reference/client/"} <= found
    architecture = (tmp_path / "site" / "architecture" / "index.html").read_text(encoding="utf-8")
    assert architecture.count('<svg id="picture-') == len(set(re.findall(r'<svg id="picture-\d+"', architecture))) == 3
    if find_spec("playwright") is not None and labs.chromium_path():
        assert searched(tmp_path / "site", "cancel")[0] == "What a cancel guarantees"
    assert not (ROOT / "site").exists()
