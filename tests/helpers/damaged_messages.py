"""Damaged messages: bytes flipped, cut and doubled, and JSON values replaced by bad ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec

from nqnb.protocol.wire import CancelMessage, CancelRecord, ErrorInfo, Meta, Progress, Source, Status, TaskMessage
from nqnb.records import WorkerInfo

DEEP = b"[" * 3000 + b"]" * 3000
VICIOUS: list[bytes] = [
    *(b"null", b"true", b"{}", b"[]", b'""', b"0", b"-0", b"-1", b"1.5", b"1e5", b"1e300", b"-1e300", b"1e999"),
    *(str(number).encode() for number in (2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**400)),
    *(b"9" * 5000, b"NaN", b"Infinity", b"0x10", b"01", b"253402300800", b"-62135596801", b"9214646400"),
    *(b'"\\ud800"', b'"\xff"', b'"\\u0000"', b'"\x00"', b'"\\u001b[31m"', b'"\xe2\x80\xae"', b'"\xf0\x9f\x98\x80"'),
    *(b'"*"', b'">"', b'"a.b"', b'"a b"', b'"a..b"', b'"' + b"x" * 300 + b'"', b'"' + b"<" * 5000 + b'"'),
    *(b'"9999-12-31T23:59:59Z"', b'"9999-12-31T23:59:59-23:59"', b'"0001-01-01T00:00:00+23:59"', b'"10000-01-01"'),
    *(b'"2026-01-01T00:00:00"', b'"2026-01-01"', b'"soon"', b'"24:00"', b'"AAAA"', b'"!"'),
    *(DEEP, b"[" * 3000, b'{"a":' * 300 + b"1" + b"}" * 300, b"[" * 150 + b"]" * 150, b'[{"a":[null]}]'),
    b'{"submitted_at":1e300}',
    b'{"not_before":-1,"log":5}',
    b'{"result":' + DEEP + b"}",
    b'{"cancel":{"requested_at":1e300}}',
]
"""Valid and invalid JSON values that replace a good value."""


def full_meta() -> Meta:
    """Return a Meta with every field."""
    return Meta(
        client="ann@host",
        submitted_at=1795921528.5,
        worker="w-1",
        claim="c1",
        started_at=1795921529.5,
        finished_at=1795921530.5,
        not_before=1795921531.5,
        crashes=1,
        progress=Progress(1, 2, "half"),
        log=["12:00:00 a line"],
        error=ErrorInfo("ValueError", "no", "Traceback"),
        result=msgspec.Raw(b'{"rows":[1,2,{"a":null}]}'),
        result_key="a.7",
        cancel=CancelRecord("bob", 1795921529.0, 1795921529.5, 1795921530.0, "w-1", "stopped"),
        origin="first",
        source=Source("sweep.ipynb", 7, "tasks = nq.map(df)", "f3a9"),
        key="2026-11/sweep/7",
        group="sweep-7",
        position=3,
        label=msgspec.Raw(b'["a",7]'),
    )


def tasks(id: str, queue: str) -> list[bytes]:
    """Return good task messages and entries with an id, of nqnb and of Go clients."""
    meta = full_meta()
    own = [
        TaskMessage(ID=id, Queue=queue, Payload=b'{"path":"a.png"}', Meta=Meta(client="ann", submitted_at=1795921528)),
        TaskMessage(ID=id, Queue=queue, Sequence=7, Status=Status.PROCESSING, Payload=b"[1,2]", Timeout=60, Meta=meta),
        TaskMessage(ID=id, Queue=queue, Status=Status.COMPLETED, CompletedAt=1795921530, MaxRetry=3, Meta=meta),
        TaskMessage(ID=id, Queue=queue, Deadline=1795921530, CurrentRetry=1, MaxRetry=3),
        TaskMessage(ID=id, Queue=queue, ProcessAt="2026-01-01T00:00:00.5Z", Payload=b"\x00\xff"),
    ]
    return [*(each.encode() for each in own), *(_renamed(data, id, queue) for data in _GO_TASKS)]


def presences(id: str, queue: str) -> list[bytes]:
    """Return good presence entries."""
    more = {"host": "h", "pid": 7, "version": "1", "queues": [queue], "concurrency": 8, "running": ["a", "b"]}
    some = {"id": id, **more, "started_at": "2026-11-24T03:00:28.5Z", "ttl": 28.5}
    msgspec.convert(some, WorkerInfo)
    return [json.dumps(some).encode(), json.dumps({**some, "started_at": "2026-11-24T03:00:28+05:30"}).encode()]


def intents() -> list[bytes]:
    """Return good cancel requests."""
    return [b"{}", *(msgspec.json.encode(each) for each in (CancelRecord("bob", 1.5), full_meta().cancel))]


def cancels(id: str, queue: str) -> list[bytes]:
    """Return good cancel messages."""
    return [CancelMessage(id, f"{queue}.cancel").encode(), CancelMessage(id).encode()]


def results() -> list[bytes]:
    """Return good results."""
    return [b"null", b"7", b'"text"', b'{"rows":[{"a":1.5,"b":[true,null]}]}', b"[]"]


def notes() -> list[bytes]:
    """Return good notes that say who paused a queue."""
    return [b'{"by":"ann","at":1795921528.5}', b""]


class Mutator:
    """Damages bytes at random, by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choice(self, some: list[bytes]) -> bytes:
        return self._random.choice(some)

    def keys(self, count: int) -> list[bytes]:
        """Return random last tokens of a subject, of all characters that a server accepts there."""
        some = (self._random.randbytes(self._random.choice((1, 2, 5, 30))) for _ in range(count))
        return [b"*", b">", *(each.translate(None, b" \t\r\n\0.") or b"\xff" for each in some)]

    def __call__(self, data: bytes) -> bytes:
        """Return the bytes with one to four damages."""
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            data = self._random.choice((self._value, self._value, self._value, self._bytes))(data)
        return data

    def _value(self, data: bytes) -> bytes:
        """Replace a value in the JSON or add a key. Damage the bytes if they are not JSON."""
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return self._bytes(data)
        places = list(_places(tree))
        if not places:
            return self._random.choice(VICIOUS)
        parent, key = self._random.choice(places)
        mark = f"@{self._random.random()}@"
        if isinstance(parent, dict) and self._random.random() < 0.1:
            key = self._random.choice(("More", "Meta", "cancel", "result", "ID", "\u001b[1m"))
        value = parent[key] if isinstance(parent, list) else parent.get(key)
        parent[key] = mark
        kinds = [each for each in VICIOUS if _kind(each) == _kind(json.dumps(value).encode())]
        bad = self._random.choice(kinds if kinds and self._random.random() < 0.6 else VICIOUS)
        # As bytes, because an encoder cannot write most of these values.
        plain = json.dumps(tree, ensure_ascii=False).encode("utf-8", "replace")
        return plain.replace(f'"{mark}"'.encode(), bad)

    def _bytes(self, data: bytes) -> bytes:
        draw, damaged = self._random, bytearray(data)
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((1, 1, 2, 8, 64)))
        what = draw.randrange(6)
        if what == 0 and data:
            damaged[min(start, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif what == 1:
            del damaged[start:end]
        elif what == 2:
            damaged[start:start] = damaged[start:end]
        elif what == 3:
            del damaged[start:]
        elif what == 4:
            damaged[start:start] = draw.randbytes(draw.choice((1, 2, 8)))
        else:
            damaged[start:start] = draw.choice(VICIOUS)
        return bytes(damaged)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every value in a tree, as its parent and key."""
    found: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        each = todo.pop()
        inner = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        for key, value in inner:
            found.append((each, key))
            todo.append(value)
    return found


def _kind(value: bytes) -> str:
    """Return the kind of a JSON value, by its first character."""
    start = value[:1].decode("latin-1")
    return "number" if start in "-0123456789" else start


def _renamed(data: bytes, id: str, queue: str) -> bytes:
    return msgspec.json.encode({**json.loads(data), "ID": id, "Queue": queue})


_GO_TASKS = sorted(
    {
        line["data"].encode()
        for line in map(json.loads, (Path(__file__).parents[1] / "protocol" / "go_nq.jsonl").read_text().splitlines())
        if line["subject"].endswith(".task") or line["subject"].startswith("$KV.nq-store.")
    }
)
"""Messages of a Go client and a Go worker."""
