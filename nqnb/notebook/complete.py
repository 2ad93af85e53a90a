"""Completes `%nq` and `%%nq` lines with Tab: commands, options, states, queues and ids."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

_LINE = re.compile(r"\s*(?:[\w.,\s]+=\s*)?%{1,2}nq\s+(.*)", re.DOTALL)
"""A line with the magic, which may give what the command returns a name; and what was typed of the command."""


def begin(shell: Any) -> None:
    """Complete in a shell from now on."""

    # A matcher rather than a hook of `complete_command`: beside what a hook finds, Python's names and keywords are
    # offered too, which mean nothing here.
    @context_matcher(identifier="nqnb")  # type: ignore[untyped-decorator]  # IPython gives it no types
    def nqnb_matcher(context: CompletionContext) -> SimpleMatcherResult:
        found = _found(shell, context.text_until_cursor, context.token)
        return {  # type: ignore[typeddict-item]  # IPython calls the others optional
            "completions": [SimpleCompletion(each) for each in found],
            "suppress": bool(found),
            "ordered": True,
        }

    shell.Completer.custom_matchers.append(nqnb_matcher)


def end(shell: Any) -> None:
    """Complete no more; nothing happens where it never began."""
    kept = [each for each in shell.Completer.custom_matchers if getattr(each, "matcher_identifier", "") != "nqnb"]
    shell.Completer.custom_matchers[:] = kept


def _found(shell: Any, text: str, token: str) -> list[str]:
    line = _LINE.fullmatch(text)
    if line is None:
        return []
    # An error in the middle of somebody's typing helps nobody.
    with contextlib.suppress(Exception):
        return completions(shell, line[1], token)
    return []


def completions(shell: Any, typed: str, token: str) -> list[str]:
    """The words that may stand at the end of a line.

    The server is asked for a second and a half at most (see `nqnb.commands.shell_completion`), and not at all while
    it is away.

    Args:
        shell: the IPython shell.
        typed: what follows the magic, up to the cursor.
        token: the end of it that IPython will replace: it cuts words at ``=``, quotes, and the like.
    """
    from click.shell_completion import ShellComplete

    from nqnb.notebook.front import Completing
    from nqnb.notebook.tree import tree
    from nqnb.notebook.typed import words_to_complete

    given, incomplete = words_to_complete(typed)
    completer = ShellComplete(tree, {"obj": Completing(shell)}, "%nq", "")
    found = [each.value for each in completer.get_completions(given, incomplete) if each.type == "plain"]
    # Of a word that IPython takes for several, only the last part is replaced.
    before = incomplete.removesuffix(token)
    return [each.removeprefix(before) if each.startswith(incomplete) else each for each in found]
