"""Run one ``nqnb`` command line, and convert its outcome to an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from nqnb.cli.streams import discard, prepare_streams
from nqnb.errors import BadInput, ConnectionFailed, NoRoom, NqnbError
from nqnb.garbage import rare_collections
from nqnb.version import __version__

if TYPE_CHECKING:
    from nqnb.cli.shell import Shell

__all__ = ["exit_code", "main", "usage"]

DONE, REFUSED, USAGE, NO_CONNECTION = range(4)
INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 141
"""The exit code that a shell reports for a process that was killed by SIGPIPE."""

_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""The error numbers of writes that fail because the disk is full or faulty."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, and return its exit code.

    Args:
        arguments: the command-line arguments; the default is ``sys.argv[1:]``.

    Returns:
        0 for success, 1 for a failure, 2 for a usage error, 3 if the server cannot be used, 130 after an interrupt, or
        141 if stdout was closed.
    """
    prepare_streams()
    if "_NQNB_COMPLETE" in os.environ:
        logging.disable()  # log records would appear in the command line that is being completed
    given = list(sys.argv[1:] if arguments is None else arguments)
    shell: Shell | None = None
    try:
        if given == ["--version"]:
            # The commands take most of the start time, and `--version` needs none of them.
            print(f"nqnb {__version__}")
            code = DONE
        else:
            from nqnb.cli.shell import Shell

            shell = Shell()
            with rare_collections():
                code = _run(shell, given)
        sys.stdout.flush()
        return code
    except OSError as error:
        if _is_closed_pipe(error):
            discard(sys.stdout)
            return CLOSED_PIPE
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        discard(sys.stdout)
        return _unwritten(shell, error)


def _run(shell: Shell, given: list[str]) -> int:
    from nqnb.commands.command_tree import tree

    try:
        record = tree.main(given, prog_name="nqnb", obj=shell, standalone_mode=False)
    except (click.Abort, KeyboardInterrupt) as error:
        # click replaces the interrupt with its own error.
        shell.interrupted(str(error.__cause__ or error))
        return INTERRUPTED
    except click.ClickException as error:
        # click stops at the first error, so it may not have parsed --json.
        shell.json |= "--json" in given[: given.index("--") if "--" in given else None]
        shell.complain(error, usage(error))
        return USAGE
    except NqnbError as error:
        shell.complain(error)
        return exit_code(error)
    if isinstance(record, int):  # --help and --version have already printed their text
        return record
    if record is not None:
        shell.show(record)
        for each in getattr(record, "errors", ()):
            shell.complain(each)
    return DONE if getattr(record, "ok", True) else REFUSED


def _is_closed_pipe(error: OSError) -> bool:
    """Return whether an error means that the reader of stdout has exited. Windows may report EINVAL in this case."""
    if isinstance(error, BrokenPipeError):
        return True
    if sys.platform != "win32" or error.errno != errno.EINVAL:
        return False
    try:
        sys.stdout.flush()  # fails again, because the output is still in the buffer
    except OSError:
        return True
    return False


def _unwritten(shell: Shell | None, error: OSError) -> int:
    failed = OSError(f"the output cannot be written: {error.strerror}. Check the disk.")
    try:
        if shell is None:
            print(f"nqnb: {failed}", file=sys.stderr)
        else:
            shell.complain(failed)
    except OSError:  # stderr fails in the same way
        discard(sys.stderr)
    return REFUSED


def exit_code(error: NqnbError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, ConnectionFailed) and not isinstance(error, NoRoom):
        return NO_CONNECTION
    return USAGE if isinstance(error, BadInput) else REFUSED


def usage(error: click.ClickException) -> str:
    """Return the message of a usage error, with the command that prints the help text."""
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} -h`)" if context is not None else ""
    return error.format_message().removesuffix(".") + hint
