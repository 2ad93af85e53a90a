"""Suggestions for unknown commands, including commands of other programs with an equivalent in nqnb."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import click

_CUTOFF = 0.6
"""The minimum similarity, from 0 to 1, between an unknown command and a suggested command."""
_MAX_SUGGESTIONS = 3
OTHER_WORDS: dict[str, dict[str, str]] = {
    "": {
        "cancel": "abort delete kill remove revoke rm stop terminate",
        "check": "health healthcheck ping",
        "doctor": "diagnose fix repair",
        "down": "shutdown stop",
        "exporter": "metrics prometheus",
        "queue pause": "hold suspend",
        "queue purge": "clear empty flush",
        "queue resume": "continue unpause",
        "queues": "info stats status",
        "schedule": "beat cron every periodic recurring",
        "submit": "add apply call create dispatch enqueue new publish push put send",
        "task logs": "log",
        "task requeue": "replay rerun resubmit retry",
        "task result": "get",
        "task show": "describe inspect view",
        "tasks": "jobs list ls ps",
        "top": "dashboard monitor ui",
        "up": "serve server",
        "up --detach": "start",
        "up --stop": "down shutdown stop",
        "watch": "events follow status tail",
        "worker": "consume run start work",
    },
    "task": {
        "submit": "add create enqueue new submit",
        "task cancel": "abort delete kill remove revoke rm stop terminate",
        "task failures": "errors failed",
        "task list": "ls ps",
        "task logs": "output tail",
        "task requeue": "replay rerun restart resubmit retry",
        "task result": "value wait",
        "task show": "describe get info inspect view",
        "watch": "follow",
    },
    "queue": {
        "queue delete": "drop remove rm",
        "queue limit": "concurrency rate throttle",
        "queue list": "ls",
        "queue pause": "hold stop suspend",
        "queue purge": "clear empty flush",
        "queue resume": "continue start unpause",
        "queue stats": "describe get info inspect show status view",
        "submit": "add create new submit",
        "tasks": "tasks",
    },
    "schedule": {
        "schedule add": "create new set",
        "schedule list": "get info ls show status",
        "schedule pause": "disable stop suspend",
        "schedule remove": "cancel delete rm",
        "schedule resume": "continue enable start unpause",
        "schedule run": "fire now trigger",
    },
}
"""For each group of commands ("" is the top level), a dict that maps nqnb's command lines to other programs' words.

The words are separated by spaces. Each word is a name that another program uses for the same command. The command
``down`` exists only in notebooks.
"""


def no_such_command(given: str, group: click.Group, ctx: click.Context) -> click.UsageError:
    """Return the error for an unknown command, with advice on what to use instead."""
    suggestions = [f"'{ctx.find_root().command_path} {each}'" for each in _suggestions(given.lower(), group, ctx)]
    advice = f"Did you mean {' or '.join(suggestions)}?" if suggestions else "Use --help to list the commands"
    return click.UsageError(f"command {given!r} is unknown: {ctx.command_path} has no such command. {advice}", ctx=ctx)


def _suggestions(word: str, group: click.Group, ctx: click.Context) -> list[str]:
    root = ctx.find_root().command
    name = "" if group is root else f"{group.name}"
    found = [
        line
        for line, words in OTHER_WORDS.get(name, {}).items()
        if word in words.split() and is_command_line(line, root)
    ]
    prefix = f"{name} " if name else ""
    names = [each for each, command in group.commands.items() if not command.hidden]
    if not found:
        found = [f"{prefix}{each}" for each in names if len(word) > 2 and each.startswith(word)]
    if not found and group is root:
        found = [line for line in _nested(group) if line.split()[1] == word]
    if not found:
        found = [f"{prefix}{each}" for each in difflib.get_close_matches(word, names, 1, _CUTOFF)]
    return found[:_MAX_SUGGESTIONS]


def _nested(root: click.Group) -> Iterator[str]:
    for name, child in root.commands.items():
        if isinstance(child, click.Group):
            yield from (f"{name} {each}" for each in child.commands)


def is_command_line(line: str, command: click.Command) -> bool:
    """Return whether ``command`` has the subcommand or option that ``line`` names. Notebooks lack some commands."""
    *path, last = line.split()
    for word in [*path, *([] if last.startswith("--") else [last])]:
        found = command.commands.get(word) if isinstance(command, click.Group) else None
        if found is None:
            return False
        command = found
    return not last.startswith("--") or any(last in param.opts for param in command.params)
