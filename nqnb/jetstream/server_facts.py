"""Read what `nqnb.doctor` checks on a server: the streams, consumers, limits and clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nqnb.jetstream.connection import Connection
from nqnb.jetstream.queue_streams import list_streams
from nqnb.protocol import names
from nqnb.protocol.wire import parse_time
from nqnb.settings import BUCKETS


@dataclass(frozen=True, slots=True)
class Usage:
    """A limit, and how much of it is used. ``unit`` names what is counted, such as "bytes" or "messages"."""

    used: int
    limit: int
    unit: str


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """A stream: its number of replicas, its limits, and whether it drops the oldest messages when it is full."""

    name: str
    replicas: int
    drops_oldest: bool
    usages: list[Usage]
    max_age: float = 0.0
    """The number of seconds after which the server deletes a message, or 0 if it deletes none."""
    max_per_subject: int = 0
    """The maximum number of messages with the same subject, or 0 if there is no maximum."""
    refuses_per_subject: bool = False
    """Whether the stream refuses messages beyond ``max_per_subject``. Otherwise, a new message replaces the oldest."""


@dataclass(frozen=True, slots=True)
class ConsumerFacts:
    """The consumer that all workers of a queue share. ``unacked`` is the number of unacked messages and its limit."""

    ack_wait: float
    """The ack wait in seconds."""
    paused: bool
    unacked: Usage
    max_deliver: int = 0
    """The maximum number of deliveries of a message, or 0 if there is no maximum."""


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """The streams and the consumer of a queue, or None for each that does not exist."""

    name: str
    tasks: StreamFacts | None = None
    cancels: StreamFacts | None = None
    consumer: ConsumerFacts | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The configuration and usage of a server, as the server reports them.

    Attributes:
        version: the version as a tuple, such as (2, 12), or None if it is unknown.
        servers: the number of servers in the cluster, or 1 if the server is not in a cluster. A server with several
            IPv4 addresses is counted several times.
        buckets: the streams of nqnb's buckets.
        logs: the stream of task logs, or None if it does not exist.
        queues: the queues by name.
        account: the limits of the account.
        clocks: a dict that maps the name of each server to two bounds, a lower and an upper one. They are the minimum
            and the maximum number of seconds by which the server's clock is ahead of this machine's clock.
    """

    version: tuple[int, int] | None
    servers: int
    buckets: list[StreamFacts]
    queues: dict[str, QueueFacts]
    account: list[Usage]
    logs: StreamFacts | None = None
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def streams(self) -> Iterator[StreamFacts]:
        """The streams of all buckets and queues, and of the task logs. A stream that queues share appears only once."""
        of_queues = (stream for queue in self.queues.values() for stream in (queue.tasks, queue.cancels) if stream)
        logs = [] if self.logs is None else [self.logs]
        yield from {stream.name: stream for stream in (*self.buckets, *logs, *of_queues)}.values()


async def read_facts(connection: Connection, queue: str | None = None) -> ServerFacts:
    """Read the configuration and usage of the server and its queues.

    Args:
        connection: the connection.
        queue: the queue to read, or None to read all queues.

    Raises:
        NqnbError: the server did not reply, or the user has no permission for a request.
    """
    asked = time.time()
    infos = await list_streams(connection, ">")
    answered = time.time()
    clocks: dict[str, tuple[float, float]] = {}
    seen: set[str] = set()
    own = str(connection.client.server_info.get("server_name") or "")
    subjects: dict[str, StreamFacts] = {}
    for info in infos:
        cluster = info.get("cluster") or {}
        leader = str(cluster.get("leader") or own)
        seen |= {leader, *(str(peer.get("name")) for peer in cluster.get("replicas") or ())}
        stamp = parse_time(str(info.get("ts", "")))
        if stamp:
            low, high = clocks.get(leader, (-1e12, 1e12))
            clocks[leader] = (max(low, stamp - answered), min(high, stamp - asked))
        facts = _stream_facts(info)
        subjects.update((subject, facts) for subject in info["config"].get("subjects") or ())
    settings = connection.settings
    buckets = [getattr(settings, name) for name in BUCKETS]
    known = [
        names.queue_of_subject(subject)
        for subject in subjects
        if subject.endswith(names.task_subject("")) and names.is_queue(names.queue_of_subject(subject))
    ]
    return ServerFacts(
        version=_version(connection),
        servers=_count_servers(connection, seen),
        buckets=[subjects[subject] for bucket in buckets if (subject := names.key_subject(bucket, ">")) in subjects],
        queues={
            name: await _queue_facts(connection, name, subjects) for name in sorted(known) if queue in (None, name)
        },
        account=list(_account_usages(await connection.api("INFO"))),
        logs=subjects.get(names.log_subject(">")),
        clocks=clocks,
    )


async def _queue_facts(connection: Connection, queue: str, subjects: Mapping[str, StreamFacts]) -> QueueFacts:
    tasks = subjects[names.task_subject(queue)]
    info = await connection.find(f"CONSUMER.INFO.{tasks.name}.{names.CONSUMER}")
    consumer = None
    if info is not None:
        config = info["config"]
        unacked = Usage(int(info["num_ack_pending"]), int(config.get("max_ack_pending") or 0), "unacked messages")
        consumer = ConsumerFacts(
            float(config["ack_wait"]) / 1e9,
            bool(info.get("paused")),
            unacked,
            max(0, int(config.get("max_deliver") or 0)),
        )
    return QueueFacts(queue, tasks, subjects.get(names.cancel_subject(queue)), consumer)


def _stream_facts(info: Mapping[str, Any]) -> StreamFacts:
    config, state = info["config"], info["state"]
    usages = [
        Usage(int(state["bytes"]), int(config.get("max_bytes") or 0), "bytes"),
        Usage(int(state["messages"]), int(config.get("max_msgs") or 0), "messages"),
    ]
    return StreamFacts(
        name=str(config["name"]),
        replicas=int(config.get("num_replicas") or 1),
        drops_oldest=config.get("discard") != "new",
        refuses_per_subject=config.get("discard") == "new" and bool(config.get("discard_new_per_subject")),
        usages=[usage for usage in usages if usage.limit > 0],
        max_age=float(config.get("max_age") or 0) / 1e9,
        max_per_subject=max(0, int(config.get("max_msgs_per_subject") or 0)),
    )


def _account_usages(info: Mapping[str, Any]) -> Iterator[Usage]:
    """Yield the limits of the account, or of each of its tiers. Limits that are not set are omitted."""
    for tier in (info.get("tiers") or {"": info}).values():
        limits = tier.get("limits") or {}
        for used, limit, unit in (
            ("storage", "max_storage", "bytes of storage"),
            ("memory", "max_memory", "bytes of memory"),
            ("streams", "max_streams", "streams"),
            ("consumers", "max_consumers", "consumers"),
        ):
            if int(limits.get(limit) or 0) > 0:
                yield Usage(int(tier.get(used) or 0), int(limits[limit]), unit)


def _version(connection: Connection) -> tuple[int, int] | None:
    major, _, rest = connection.server_version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _count_servers(connection: Connection, seen: set[str]) -> int:
    if not connection.clustered:
        return 1
    # A server may advertise an IPv4 and an IPv6 address.
    advertised = Counter(str(url).startswith("[") for url in connection.client.server_info.get("connect_urls") or ())
    return max(len(seen), *advertised.values(), 1)
