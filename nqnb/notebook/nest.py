"""`nqnb.nest` and `%nq nest`: lets cells call ``asyncio.run(...)``, as scripts do."""

from __future__ import annotations

import asyncio

from nqnb.errors import BadInput

_SAID = (
    "asyncio.run(...) works in cells now, until the kernel restarts. It costs a NATS client on the kernel's loop about "
    "a third of its throughput; nqnb's own loop is left as it is, so sessions, handlers and tables need none of this"
)


def nest() -> None:
    """Make asyncio reentrant in this kernel, by nest_asyncio2, so that cells can call ``asyncio.run(...)``.

    nqnb itself has no need for it: a session's calls wait by themselves, and its tasks can be awaited in a cell. It
    cannot be undone but by a restart of the kernel, and costs a NATS client that lives on the kernel's loop about a
    third of its throughput. Twice is as once.

    Raises:
        BadInput: no event loop runs here, so there is none to be made reentrant.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise BadInput(
            "no event loop runs here, as one does in a notebook's kernel: asyncio.run(...) works as it is"
        ) from None
    import nest_asyncio2  # type: ignore[import-untyped]  # it has no types

    nest_asyncio2.apply(loop)
    print(_SAID)  # noqa: T201  in a cell, that is where a person reads
