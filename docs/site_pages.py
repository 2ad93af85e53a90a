"""Generate pages of the documentation site: the home page, the reference, the changelog and the tutorials.

MkDocs loads this file as a hook; see ``hooks`` in ``mkdocs.yml``. The reference is generated from the code, so it lists
every public name and every option.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import click
import mmdr
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
_AREAS = {
    "client": ("Client", ("nqnb.client", "nqnb.doctor", "nqnb.failures")),
    "worker": ("Worker", ("nqnb.worker", "nqnb.retry")),
    "notebook": ("Notebook", ("nqnb.notebook",)),
    "records": ("Records", ("nqnb.records", "nqnb.protocol")),
    "configuration": ("Settings, stores and servers", ("nqnb.settings", "nqnb.store", "nqnb.server", "nqnb.version")),
    "errors": ("Errors", ("nqnb.errors",)),
}
"""The file name and the heading of each page about the Python API, with the modules of its names."""
_RETURNED = {
    "notebook": (
        "nqnb.notebook.session.Session",
        "nqnb.notebook.tasks.TaskList",
        "nqnb.notebook.tasks.SessionTask",
        "nqnb.widgets.table.TaskTable",
    ),
    "worker": ("nqnb.worker.typed_task.TaskFunction", "nqnb.worker.typed_task.TypedTask"),
    "configuration": ("nqnb.server.cluster.Cluster", "nqnb.tracing.instrument", "nqnb.tracing.uninstrument"),
}
"""Classes that are not names of the package itself, but whose methods users call, and functions of modules, by the file
name of their page."""

_ABOUT_EXAMPLES = (
    "The examples run in a notebook or in `python -m asyncio`, after `import asyncio, nqnb`, "
    "`from datetime import timedelta` and `nq = await nqnb.connect()`. "
    "A worker serves the queue `resize`: it returns the path and the width of the image, and fails for text files."
)


@event_priority(100)  # before the plugin that reads notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files from outside the folder ``docs``."""
    pages = {
        "index.md": _home(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "security.md": (ROOT / "SECURITY.md").read_text(encoding="utf-8"),
        "reference/commands.md": commands_page(),
        "reference/magics.md": magics_page(),
    }
    pages.update(api_pages())
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in (*_NOTEBOOKS, ROOT / "notebooks" / "live-table.png"):
        # The plugin that reads notebooks accepts only files with a source folder.
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw the pictures of the pages while the site is built. The theme would load a program from the network."""
    fence = {"name": "mermaid", "class": "mermaid", "format": picture}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def picture(source: str, language: str, css_class: str, options: dict[str, str], md: object, **more: object) -> str:
    """Return a diagram as SVG. The arguments are those of a custom fence of superfences."""
    look = {"theme": "neutral", "sequence": {"mirrorActors": False, "actorMargin": 30}}
    svg = mmdr.render(f"%%{{init: {json.dumps(look)}}}%%\n{source}").svg()
    name = f"picture-{zlib.crc32(source.encode())}"  # a page may have several, whose styles must not be mixed
    return f'<div class="picture">{svg.replace("merman", name)}</div>'


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files that are not part of the site with their text, and let the search find guides first.

    A link whose text is the name of a page's file gets the title of the page instead.
    """
    if page.file.src_uri == f"{page.file.name}.md" and page.file.name not in ("changelog", "comparison", "performance"):
        page.meta["search"] = {"boost": 2}
    if page.file.src_uri.startswith("reference/"):
        return markdown
    markdown = markdown.replace("](../notebooks/", "](notebooks/")
    if page.file.src_uri in ("changelog.md", "contributing.md", "security.md"):
        markdown = markdown.replace("](docs/", "](")
    for target in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        markdown = markdown.replace(f"]({target}", f"]({target.lower()}")
    markdown = re.sub(r"\[([^\]]+)\]\((?:(?:\.\./|examples/|tests/|nqnb/)[^)]*|notebooks/)\)", r"\1", markdown)

    def titled(link: re.Match[str]) -> str:
        file = files.get_file_from_path(link[1])
        heading = re.match("# (.*)", file.content_string) if file else None
        return f"[{heading[1] if heading else link[1]}]({link[1]}"

    return re.sub(r"\[(?:docs/)?[\w-]+\.md\]\(([\w-]+\.md)", titled, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links between notebooks lead to their pages. The plugin that reads notebooks keeps the names of files."""
    return re.sub(r'href="(\d\d-[\w-]+)\.ipynb"', r'href="../\1/"', html)


def _home() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


# -- the Python API ----------------------------------------------------------------------------------------------------


def public_names() -> dict[str, str]:
    """Return the public names of the package, and the module that defines each."""
    stub = ast.parse((ROOT / "nqnb" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def api_pages() -> dict[str, str]:
    """Return the pages that document the public names, by the path of the page."""
    left, pages = public_names(), {}
    for file, (heading, modules) in _AREAS.items():
        names = [f"{module}.{name}" for name, module in left.items() if module.startswith(modules)]
        for name in names:
            del left[name.rpartition(".")[2]]
        names += _RETURNED.get(file, ())
        pages[f"reference/{file}.md"] = "\n\n".join(
            [f"# {heading}", _ABOUT_EXAMPLES, *(f"::: {name}" for name in names)]
        )
    if left:
        raise ValueError(f"no page documents {sorted(left)}; add their modules to _AREAS")
    return pages


# -- commands and magics -----------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return the page that documents every command and option of ``nqnb``."""
    from nqnb.commands.command_tree import tree

    text = "# Commands\n\n`nqnb COMMAND --help` prints the same text. See also [the guide](../command-line.md).\n\n"
    return text + "\n".join(_sections(tree, "nqnb"))


def magics_page() -> str:
    """Return the page that documents every command and option of ``%nq``."""
    from nqnb.notebook.magics.nq_commands import tree

    text = "# Magics\n\n`%nq COMMAND --help` prints the same text. See also [the guide](../notebook.md).\n\n"
    return text + "\n".join(_sections(tree, "%nq"))


def every_command(command: click.Command, path: str) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Return the path, command and context of a command and of all its subcommands."""
    context = click.Context(command, info_name=path)
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from every_command(below, f"{path} {name}")


def _sections(root: click.Command, name: str) -> Iterator[str]:
    for path, command, context in every_command(root, name):
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"## `{path}`\n"
        yield f"```text\n{path} {usage}\n```\n"
        yield f"{_plain(command.help)}\n"
        options = [each for each in command.get_params(context) if isinstance(each, click.Option)]  # no arguments
        rows = [record for each in options if (record := each.get_help_record(context)) is not None]
        if rows:
            yield "| option | meaning |\n|---|---|"
            for option, meaning in rows:
                yield f"| `{_cell(option)}` | {_escaped(_cell(meaning))} |"
            yield ""
        if command.epilog:
            yield f"```text\n{_plain(command.epilog)}\n```\n"


def _plain(text: str | None) -> str:
    """Return help text without click's marks for paragraphs that must not be wrapped."""
    return inspect.cleandoc(text or "").replace("\b\n", "").strip()


def _cell(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return re.sub(r"([<*_\[\]|])", r"\\\1", text)
