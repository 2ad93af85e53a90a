"""Tab completion for `%nq` and `%%nq` lines: commands, options, states, queues and ids."""

from __future__ import annotations

import contextlib
import re
import textwrap
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

_HELP_CHARACTERS = 48
"""The maximum length of the help text next to a completion."""
_UNBROKEN = str.maketrans({" ": "\N{NO-BREAK SPACE}", "-": "\N{NON-BREAKING HYPHEN}"})
_MAGIC_LINE = re.compile(r"\s*(?:[\w.,\s]+=\s*)?%{1,2}nq\s+(.*)", re.DOTALL)
"""A pattern for a line that contains the magic, possibly in an assignment. The group is the command typed so far."""


def begin(shell: Any) -> None:
    """Enable completion in a shell."""

    # This is a matcher, because IPython adds Python names and keywords to the results of a `complete_command` hook.
    @context_matcher(identifier="nqnb")  # type: ignore[untyped-decorator]  # untyped in IPython
    def nqnb_matcher(context: CompletionContext) -> SimpleMatcherResult:
        found = _matches(shell, context.text_until_cursor, context.token)
        return {  # type: ignore[typeddict-item]  # the other keys are optional in IPython
            "completions": found,
            "suppress": bool(found),
            "ordered": True,
        }

    shell.Completer.custom_matchers.append(nqnb_matcher)


def end(shell: Any) -> None:
    """Disable completion in a shell, if it was enabled."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [matcher for matcher in matchers if getattr(matcher, "matcher_identifier", "") != "nqnb"]


def _matches(shell: Any, text: str, token: str) -> list[SimpleCompletion]:
    magic_line = _MAGIC_LINE.fullmatch(text)
    if magic_line is None:
        return []
    # An error message while the user is typing would not help.
    with contextlib.suppress(Exception):
        return completions(shell, magic_line[1], token)
    return []


def completions(shell: Any, typed: str, token: str) -> list[SimpleCompletion]:
    """Return the possible completions of a line.

    The ``type`` of a completion is a help text, because front ends show the type next to the completion. Requests to
    the server take at most a second and a half (see `nqnb.commands.shell_completion`). No requests are sent while the
    session is disconnected.

    Args:
        shell: the IPython shell.
        typed: the text between the magic and the cursor.
        token: the last part of ``typed``, which IPython replaces. IPython also splits words at ``=`` and quotes.
    """
    from click.shell_completion import ShellComplete

    from nqnb.notebook.magics.frontend import CompletionFront
    from nqnb.notebook.magics.nq_commands import tree
    from nqnb.notebook.magics.parse_line import words_to_complete

    found = words_to_complete(typed)
    if found is None:
        return []
    whole_words, incomplete = found
    completer = ShellComplete(tree, {"obj": CompletionFront(shell)}, "%nq", "")
    in_kernel = getattr(shell, "kernel", None) is not None
    # IPython may split the word, and then replaces only the last part.
    kept = incomplete.removesuffix(token)
    return [
        SimpleCompletion(
            item.value.removeprefix(kept) if item.value.startswith(incomplete) else item.value,
            type=_help(item.help or "", in_kernel=in_kernel) or None,
        )
        for item in completer.get_completions(whole_words, incomplete)
        if item.type == "plain"
    ]


def _help(text: str, *, in_kernel: bool) -> str:
    short = textwrap.shorten(text.partition(". ")[0], _HELP_CHARACTERS, placeholder=" …")
    # JupyterLab would wrap the text, and show the lines on top of each other.
    return short.translate(_UNBROKEN) if in_kernel else short
