"""The display of errors in a cell. The frames of the user's code are shown, and the frames of nqnb are hidden.

If an error has a ``_render_traceback_`` method, IPython calls that method instead of rendering the traceback. Only the
display changes. The error keeps its complete traceback for ``%debug`` and for programs.
"""

from __future__ import annotations

import contextlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from nqnb.errors import NqnbError

_OWN_FOLDER = str(Path(__file__).parents[1]) + os.sep
_STANDARD_FOLDER = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED_FOLDERS = ("site-packages", "dist-packages")
"""Folders within the standard library's folder that contain other packages."""


def replace_traceback(error: BaseException | type[BaseException], render: Callable[..., list[str]]) -> None:
    """Make IPython show the lines from ``render`` instead of the traceback, for one error or for a class of errors."""
    error._render_traceback_ = render  # type: ignore[union-attr]  # the hook that IPython calls


def begin() -> None:
    """Hide nqnb's frames in the display of every `NqnbError`. This function is idempotent."""
    replace_traceback(NqnbError, _render)


class HiddenFrames:
    """A callable that renders an error without nqnb's frames."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self) -> list[str]:
        """Return the lines to show."""
        return _render(self._error)


def hide_frames(error: BaseException) -> None:
    """Hide nqnb's frames in the display of an error that is not an `NqnbError`, such as ``KeyboardInterrupt``."""
    replace_traceback(error, HiddenFrames(error))


def _render(error: BaseException) -> list[str]:
    from IPython import get_ipython

    shell = get_ipython()
    assert shell is not None  # noqa: S101  for the type checker: IPython is the caller
    with _hidden_frames(error):
        lines: list[str] = shell.InteractiveTB.structured_traceback(type(error), error, error.__traceback__)
    return lines


@contextlib.contextmanager
def _hidden_frames(error: BaseException) -> Iterator[None]:
    """Temporarily remove nqnb's frames from an error and its causes. Causes that have no other frames are removed."""
    changed: list[tuple[BaseException, TracebackType | None, BaseException | None, bool]] = []
    each: BaseException | None = error
    while each is not None and all(each is not known for known, *_ in changed):
        cause = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        changed.append((each, each.__traceback__, each.__cause__, each.__suppress_context__))
        each.__traceback__ = foreign_frames(each.__traceback__)
        if cause is not None and foreign_frames(cause.__traceback__) is None:
            each.__cause__ = cause = None  # the message of the error includes that of the cause
        each = cause
    try:
        yield
    finally:
        for each, trace, cause, suppressed in changed:
            each.__traceback__, each.__cause__, each.__suppress_context__ = trace, cause, suppressed


def foreign_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without nqnb's frames and without the standard library frames that follow nqnb's frames."""
    kept: list[TracebackType] = []
    inside = False
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        own = file.startswith(_OWN_FOLDER)
        inside = inside or own
        if not (own or (inside and _is_standard(file))):
            kept.append(trace)
        trace = trace.tb_next
    made: TracebackType | None = None
    for each in reversed(kept):
        made = TracebackType(made, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return made


def _is_standard(file: str) -> bool:
    inner = file.startswith(_STANDARD_FOLDER) and file[len(_STANDARD_FOLDER) :].split(os.sep)[0]
    return bool(inner) and inner not in _INSTALLED_FOLDERS
