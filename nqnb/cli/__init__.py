"""The shell's front door to the commands, and its exit codes."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

import click

from nqnb.cli.shell import Shell
from nqnb.cli.streams import give_up, prepare
from nqnb.commands import tree
from nqnb.errors import BadInput, ConnectionFailed, NoRoom, NqnbError

__all__ = ["exit_code", "main", "usage"]

DONE, REFUSED, USAGE, NO_CONNECTION = range(4)
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 141
"""What a shell reports of a program that wrote into a closed pipe."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What is wrong where what was printed could not be written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        arguments: default those of this process.

    Returns:
        The exit code: 0 done, 1 refused, 2 usage, 3 no connection, 130 interrupted.
    """
    prepare()
    if "_NQNB_COMPLETE" in os.environ:
        logging.disable()  # a log record would end up in somebody's command line
    shell = Shell()
    try:
        code = _run(shell, arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        give_up(sys.stdout)
        return NOBODY_READS
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        give_up(sys.stdout)
        return _unwritten(shell, error)


def _run(shell: Shell, arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        record = tree.main(given, prog_name="nqnb", obj=shell, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as error:
        # click has put its own error in the place of the interrupt.
        shell.interrupted(str(error.__cause__ or error))
        return INTERRUPTED
    except click.ClickException as error:
        # A line that is wrong may not have been read as far as there.
        shell.json |= "--json" in given[: given.index("--") if "--" in given else None]
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


def _unwritten(shell: Shell, error: OSError) -> int:
    try:
        shell.complain(OSError(f"the output could not be written: {error.strerror}"))
    except OSError:  # the errors go the same way
        give_up(sys.stderr)
    return REFUSED


def exit_code(error: NqnbError) -> int:
    """The exit code that says what kind of error it was."""
    if isinstance(error, ConnectionFailed) and not isinstance(error, NoRoom):
        return NO_CONNECTION
    return USAGE if isinstance(error, BadInput) else REFUSED


def usage(error: click.ClickException) -> str:
    """What was wrong with a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} -h`)" if context is not None else ""
    # A dot that stands alone is one of the characters that the sentence lists.
    return re.sub(r"(?<=\S)\.$", "", error.format_message()) + hint
