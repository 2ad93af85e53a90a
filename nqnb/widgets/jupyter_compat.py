"""What makes clicks arrive while a cell is busy, in the kernels that there are."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def unpin(comm: Any) -> None:
    """Let messages from the page come by whichever shell is free.

    ipykernel 7.4 answers on the shell that the comm published on last, and that is the busy one for a widget that was
    made in a cell. Its hook is private, and is left alone where it is not there.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


def warn() -> None:
    """Say so where this kernel is one of those that hang at random when widgets send to it."""
    text = trouble(getattr(sys.modules.get("ipykernel"), "__version__", ""))
    if text:
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def trouble(version: str) -> str:
    """What is wrong with buttons in a version of ipykernel; nothing where nothing is."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if major == "7" and minor in {"0", "1", "2", "3"}:
        return (
            f"ipykernel {version} may hang when a button is pressed while a cell runs; "
            'install a better one with `pip install "ipykernel>=7.4"` and restart the kernel'
        )
    return ""
