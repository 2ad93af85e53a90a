"""The card that describes a session: the server, storage, queues, workers and handlers, as HTML or plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from nqnb.client import Client
from nqnb.errors import ConnectionFailed, NqnbError
from nqnb.notebook.kernel_worker import Local
from nqnb.records import QueueInfo, WorkerInfo
from nqnb.server import detached as detached_server
from nqnb.store import StateStore
from nqnb.text import size

_MAX_LISTED = 8
"""The maximum number of queues, workers or handlers in the lists of a card."""

_STYLE = """
.nqnb-card{font:13px/1.5 system-ui,sans-serif;max-width:46em;border:1px solid #8886;border-radius:8px;
padding:.7em 1em;color:inherit}
.nqnb-card h4{margin:0 0 .3em;font-size:14px;font-weight:600}
.nqnb-card dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em;margin:0}
.nqnb-card dt{opacity:.75;width:auto;white-space:nowrap}.nqnb-card dd{margin:0;overflow-wrap:anywhere}
.nqnb-card .away{font-weight:600}
"""


@dataclass
class Card:
    """The content of a card. `fill` adds information from the server."""

    urls: Sequence[str]
    why: str
    store: StateStore | None
    local: Local
    detached: bool = False
    problem: str = ""
    version: str = ""
    jetstream: str = ""
    states: str = ""
    queues: list[QueueInfo] | None = None
    workers: list[WorkerInfo] | None = field(default=None)

    async def fill(self, client: Client) -> None:
        """Add information from the server. Information that the user has no permission to read is omitted.

        Raises:
            ConnectionFailed: the session is not connected to the server.
        """
        self.version = client.server_version
        backend = client.backend
        if not backend.connected:
            raise ConnectionFailed(
                "the session is not connected: the server is down or unreachable. The session reconnects automatically."
            )
        self.jetstream = _usage(await _allowed(backend.account_info()))
        self.queues = await _allowed(client.queues())
        self.workers = await _allowed(client.workers())
        bucket = client.settings.state_bucket
        if self.store is None:
            count = await _allowed(backend.count_states())
            self.states = f"bucket {bucket}" + ("" if count is None else f", {_count(count, 'task')}")
        else:
            self.states = f"{type(self.store).__qualname__}, your own store"

    def lines(self) -> list[tuple[str, str]]:
        """Return the labels and texts of the card."""
        found: list[tuple[str, str]] = []
        if self.problem:
            found.append(("now", self.problem))
        found.append(("server", " ".join(filter(None, ("nats-server", self.version, f"({self.why})")))))
        if self.jetstream:
            found.append(("JetStream", self.jetstream))
        if self.states:
            found.append(("states", self.states))
        if self.detached and (server := detached_server.look().server) is not None:
            found.append(("stored in", server.store))
        if self.queues is not None:
            found.append(("queues", _listed([_queue(info) for info in self.queues], "none yet")))
        if self.workers is not None:
            found.append(("workers", _listed([_worker(info) for info in self.workers], "none")))
        if len(self.local):
            found.append(("handlers", _listed([repr(self.local[queue]) for queue in self.local], "")))
        return found


def html(card: Card) -> str:
    """Return the card as HTML that uses the colours of the page, which may be light or dark."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd{' class=away' if name == 'now' else ''}>{escape(text)}</dd>".replace("\n", "<br>")
        for name, text in card.lines()
    )
    head = escape(", ".join(card.urls))
    return f'<div class="nqnb-card"><style>{_STYLE}</style><h4>nqnb · {head}</h4><dl>{items}</dl></div>'


def text(card: Card) -> str:
    """Return the card as plain text."""
    lines = [f"nqnb session with {', '.join(card.urls)}"]
    for name, said in card.lines():
        first, *rest = said.split("\n")
        lines += [f"  {name:<10}{first}", *(f"  {'':<10}{line}" for line in rest)]
    return "\n".join(lines)


async def _allowed(request: Any) -> Any:
    """Return the server's response, or None if the request failed, for example because of missing permissions."""
    try:
        return await request
    except NqnbError:
        return None


def _usage(info: dict[str, Any] | None) -> str:
    if info is None:
        return ""
    limits = info.get("limits") or {}
    parts = [f"{size(info.get('storage', 0))} on disk{_of(limits.get('max_storage'))}"]
    if info.get("memory"):
        parts.append(f"{size(info['memory'])} in memory{_of(limits.get('max_memory'))}")
    parts += [_count(info.get("streams", 0), "stream"), _count(info.get("consumers", 0), "consumer")]
    return ", ".join(parts)


def _of(limit: Any) -> str:
    return f" of {size(limit)}" if isinstance(limit, int) and limit > 0 else ""


def _queue(info: QueueInfo) -> str:
    parts = [f"{info.pending:,} pending", f"{info.processing:,} processing"]
    if info.scheduled:
        parts.append(f"{info.scheduled:,} scheduled")
    parts.append(_count(info.workers, "worker"))
    return f"{info.name}: {', '.join(parts)}{' (paused)' if info.paused else ''}"


def _worker(info: WorkerInfo) -> str:
    queues = ", ".join(info.queues)
    return f"{info.id} on {info.host}, process {info.pid}: {queues}, running {info.running_count} of {info.concurrency}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _listed(parts: list[str], none: str) -> str:
    if len(parts) > _MAX_LISTED:
        parts = [*parts[:_MAX_LISTED], f"and {len(parts) - _MAX_LISTED:,} more"]
    return "\n".join(parts) or none
