"""Figures about the shape of the source tree: files, lines, importers, repeated names, circles, private accesses.

Run ``python tests/house_figures.py [PATH]`` to print them for a checkout; it only reads syntax trees, so that it also
works on a checkout whose package cannot be imported. `test_layers` holds the figures that must be zero.
"""

from __future__ import annotations

import ast
import functools
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PUBLIC_UNDERSCORES = {"_asdict", "_fields", "_replace", "_make"}
"""Public members of a NamedTuple, in spite of their names."""


class Module(NamedTuple):
    """A module of the package: its dotted name, its file, its syntax tree and its number of lines."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def is_package(self) -> bool:
        """Whether the file is the ``__init__.py`` of a folder."""
        return self.path.name == "__init__.py"


class Import(NamedTuple):
    """An import of one module by another, at run time or for type checkers only."""

    line: int
    importer: str
    imported: str


class PrivateAccess(NamedTuple):
    """An access to a private member from outside its class or module."""

    line: int
    module: str
    text: str


@functools.cache
def modules(package: Path) -> dict[str, Module]:
    """Return the modules of a package by dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(source), source.count("\n"))
    return found


def imports_of(module: Module, known: Mapping[str, object]) -> Iterator[Import]:
    """Yield every import of a module: at its top, inside functions, and those for type checkers only.

    Args:
        module: the module.
        known: the names of the package's modules; ``from a import b`` imports ``a.b`` if that is one of them.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, module.name, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.name.split(".")
                here = here[: len(here) - node.level + module.is_package]
                base = ".".join([*here, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            for imported in dict.fromkeys(name if name in known else base for name in full):
                yield Import(node.lineno, module.name, imported)


@functools.cache
def every_import(package: Path) -> list[Import]:
    """Return every import of every module of a package."""
    known = modules(package)
    return [found for module in known.values() for found in imports_of(module, known)]


def circles(package: Path) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or by way of others.

    The package's own face, its ``__init__``, is left out: its imports for type checkers only name what it loads later.
    """
    known = modules(package)
    edges: dict[str, set[str]] = {name: set() for name in known}
    for _, importer, imported in every_import(package):
        if imported in known and importer != package.name:
            edges[importer].add(imported)
    return sorted(sorted(group) for group in _components(edges) if len(group) > 1 or group[0] in edges[group[0]])


def _components(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield the strongly connected components of a graph (Tarjan's algorithm, recursive: the graph is small)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        number[node] = low[node] = len(number)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in number:
                yield from visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], number[target])
        if low[node] == number[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            yield group

    for node in sorted(edges):
        if node not in number:
            yield from visit(node)


def single_importers(package: Path) -> dict[str, str]:
    """Return the modules that exactly one other module imports, with that module; packages are left out."""
    known = modules(package)
    importers: dict[str, set[str]] = defaultdict(set)
    for _, importer, imported in every_import(package):
        if imported in known and importer != imported:
            importers[imported].add(importer)
    return {
        name: next(iter(importers[name]))
        for name, module in known.items()
        if len(importers[name]) == 1 and not module.is_package
    }


def repeated_files(folder: Path) -> dict[str, list[str]]:
    """Return the file names that occur more than once in a folder, with their paths; ``__init__.py`` may repeat."""
    paths: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py", "conftest.py"):
            paths[path.name].append(path.relative_to(folder).as_posix())
    return {name: places for name, places in paths.items() if len(places) > 1}


def repeated_classes(package: Path) -> dict[str, list[str]]:
    """Return the names of classes that several modules define, with these modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in modules(package).values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module.name)
    return {name: where for name, where in places.items() if len(where) > 1}


def private_accesses(package: Path) -> list[PrivateAccess]:
    """Return the accesses to private members of other classes and modules.

    ``self._x``, ``cls._x`` and ``super()._x`` are fine, and so is ``other._x`` inside a class that defines ``_x``
    itself: ``other`` is another instance. So are the documented functions of ``os`` and ``sys``, such as ``os._exit``.
    An import of a private name from another module counts as an access.
    """
    known = modules(package)
    found = []
    for module in known.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if _is_private(alias.name) and f"{node.module}.{alias.name}" not in known:
                        found.append(PrivateAccess(node.lineno, module.name, f"{node.module}.{alias.name}"))
        found += [PrivateAccess(line, module.name, text) for line, text in _foreign_accesses(module.tree, set())]
    return sorted(found, key=lambda access: (access.module, access.line))


def _foreign_accesses(node: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and text of the private accesses below a node; ``own`` has the members of the classes around it."""
    if isinstance(node, ast.ClassDef):
        own = own | _members(node)
    if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
        base = node.value
        of_super = isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super"
        of_python = isinstance(base, ast.Name) and base.id in ("os", "sys")
        if not (_is_self(base) or of_super or of_python):
            yield node.lineno, ast.unparse(node)
    for child in ast.iter_child_nodes(node):
        yield from _foreign_accesses(child, own)


def _members(node: ast.ClassDef) -> set[str]:
    """Return the names of the members that a class defines: methods, fields, and what it assigns to ``self``."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _is_self(part.value):
            names.add(part.attr)
    return names


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_UNDERSCORES


def figures(checkout: Path) -> list[tuple[str, str]]:
    """Return the figures of a checkout, each with its name."""
    package, tests = checkout / "nqnb", checkout / "tests"
    known = modules(package)
    knots = circles(package)
    lines_of_tests = [path.read_text(encoding="utf-8").count("\n") for path in tests.rglob("*.py")]
    depths = Counter(len(module.path.relative_to(package).parts) for module in known.values())
    return [
        ("Python files in nqnb", f"{len(known)}, of them {depths[1]} at its root"),
        ("median lines of a file", f"{statistics.median(module.lines for module in known.values()):.0f}"),
        ("longest file", "{0.lines} lines ({0.name})".format(max(known.values(), key=lambda module: module.lines))),
        ("modules with exactly one importer", f"{len(single_importers(package))}"),
        ("file names that occur twice in nqnb", f"{len(repeated_files(package))}"),
        ("file names that occur twice in tests", f"{len(repeated_files(tests))}"),
        ("class names that occur twice in nqnb", f"{len(repeated_classes(package))}"),
        ("circles of imports", f"{len(knots)} of {sum(map(len, knots))} modules"),
        ("private members accessed from outside", f"{len(private_accesses(package))}"),
        ("lines of nqnb", f"{sum(module.lines for module in known.values()):,}"),
        ("files and lines of tests", f"{len(lines_of_tests)}, {sum(lines_of_tests):,}"),
    ]


def main() -> None:
    """Print the figures of the checkout that is named on the command line, by default this one."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--details"]
    checkout = Path(arguments[0] if arguments else Path(__file__).parents[1]).resolve()
    for name, figure in figures(checkout):
        print(f"{name + ' ':.<42} {figure}")
    if "--details" not in sys.argv:
        return
    package = checkout / "nqnb"
    for group in circles(package):
        print("circle:", *group)
    for module, importer in single_importers(package).items():
        print("one importer:", module, "in", importer)
    for name, places in {**repeated_files(package), **repeated_files(checkout / "tests")}.items():
        print("file:", name, *places)
    for name, places in repeated_classes(package).items():
        print("class:", name, *places)
    for access in private_accesses(package):
        print(f"private: {access.module}:{access.line}: {access.text}")


if __name__ == "__main__":
    main()
