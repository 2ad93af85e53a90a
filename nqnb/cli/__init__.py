"""The shell's front door to the commands, and its exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

import click

from nqnb.cli.shell import Shell
from nqnb.commands import tree
from nqnb.errors import BadInput, ConnectionFailed, NqnbError

__all__ = ["exit_code", "main", "usage"]

DONE, REFUSED, USAGE, NO_CONNECTION = range(4)
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 141
"""What a shell reports of a program that wrote into a closed pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: default those of this process.

    Returns:
        The exit code: 0 done, 1 refused, 2 usage, 3 no connection, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A narrow encoding must not turn a result into a traceback.
            stream.reconfigure(errors="replace")
    if "_NQNB_COMPLETE" in os.environ:
        logging.disable()  # a log record would end up in somebody's command line
    shell = Shell()
    try:
        code = _run(shell, arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _run(shell: Shell, arguments: Sequence[str] | None) -> int:
    try:
        record = tree.main(arguments, prog_name="nqnb", obj=shell, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        shell.complain(error, usage(error))
        return USAGE
    except NqnbError as error:
        shell.complain(error)
        return exit_code(error)
    if isinstance(record, int):  # --help and --version have spoken for themselves
        return record
    if record is not None:
        shell.show(record)
        for each in getattr(record, "errors", ()):
            shell.complain(each)
    return DONE if getattr(record, "ok", True) else REFUSED


def exit_code(error: NqnbError) -> int:
    """The exit code that says what kind of error it was."""
    if isinstance(error, ConnectionFailed):
        return NO_CONNECTION
    return USAGE if isinstance(error, BadInput) else REFUSED


def usage(error: click.ClickException) -> str:
    """What was wrong with a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} -h`)" if context is not None else ""
    return f"{error.format_message().rstrip('.')}{hint}"
