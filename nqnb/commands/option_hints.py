"""Suggestions for unknown command-line options."""

from __future__ import annotations

import difflib

import click

_CUTOFF = 0.6
"""The minimum similarity, from 0 to 1, between an unknown option and a suggested option. Dashes are ignored."""
_ALIASES: dict[str, tuple[str, ...]] = {
    "after": ("--newer-than", "--since"),
    "at": ("--process-at",),
    "before": ("--older-than",),
    "count": ("--limit",),
    "delay": ("--process-at",),
    "force": ("--yes",),
    "host": ("--url",),
    "max": ("--limit",),
    "message": ("--error",),
    "newer-than": ("--since",),
    "retries": ("--retry",),
    "server": ("--url",),
    "since": ("--newer-than",),
    "state": ("--status",),
    "type": ("--error",),
    "when": ("--process-at",),
}
"""Option names that other programs use, each with the nqnb options that have the same meaning."""


def no_such_option(error: click.NoSuchOption, command: click.Command) -> click.NoSuchOption:
    """Return the error for an unknown option, with advice on what to use instead."""
    given, name = error.option_name, error.ctx.command_path if error.ctx is not None else command.name
    text = f"option {given!r} is unknown: {name} has no such option. {_advice(given, command, name)}"
    return click.NoSuchOption(given, text, ctx=error.ctx)


def _advice(given: str, command: click.Command, name: str | None) -> str:
    word = given.lstrip("-").lower().replace("_", "-")
    for param in command.params:
        if isinstance(param, click.Argument) and param.name == word:
            return f"Pass the {word} as an argument: {name} {word.upper()}"
    options = [
        opt for param in command.params if isinstance(param, click.Option) for opt in param.opts if opt[:2] == "--"
    ]
    meant = [option for option in _ALIASES.get(word, ()) if option in options]
    meant = meant or [option for option in options if len(word) > 2 and option[2:].startswith(word)]
    meant = meant or [
        f"--{near}" for near in difflib.get_close_matches(word, [each[2:] for each in options], 1, _CUTOFF)
    ]
    return f"Did you mean {meant[0]!r}?" if meant else "Use --help to list the options"
