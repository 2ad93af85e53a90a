"""Which worlds of a worker's life must hold, and which broken variants the explorer must catch in them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from nqnb.protocol.wire import Status

from .explorer import Exploration
from .life_rules import Broken
from .life_state import Ask, Fault, State
from .life_steps import Model

QUICK = (Fault.CRASH, Fault.LOST_REPLY, Fault.SHUTDOWN, Fault.CLIENT_CRASH)
"""The faults after which little else can happen at the same time."""
BY_WORKERS = {(Status.COMPLETED, Ask.RAISED), (Status.FAILED, Ask.RAISED), (Status.CANCELLED, Ask.RETURNED)}
ALL_ENDS = {
    *BY_WORKERS,
    (Status.DELETED, Ask.RETURNED),
    # The handler was faster than the cancel that had promised to stop it.
    (Status.COMPLETED, Ask.RETURNED),
    (Status.FAILED, Ask.RETURNED),
}


class World(NamedTuple):
    """A model, and what its exploration must have seen to have shown anything."""

    model: Model
    states: int
    steps: set[str]


WORLDS = {
    "two cancellers": World(
        Model(max_retry=1, cancellers=2), 5_000, {"c1 loses the race", "c0 writes cancelled", "c1's intent passes w0"}
    ),
    "three quick faults": World(
        Model(max_retry=1, faults=QUICK, together=3),
        25_000,
        {"w0 reads again: LANDED", "w1 writes processing", "w0 claims, unanswered", "s0 finds it created"},
    ),
    "two cancellers and a quick fault": World(
        Model(cancellers=2, faults=QUICK), 15_000, {"c1 writes deleted, unanswered", "c0 crashes"}
    ),
    "a worker cut off": World(
        Model(max_retry=1, faults=(Fault.DISCONNECT,)),
        50_000,
        {"w0 reads again: DROP", "w0 reads again: ACK", "w0 stops in time", "w0 catches up", "w0 drops"},
    ),
    "cut off twice": World(
        Model(cancellers=0, faults=(Fault.DISCONNECT, Fault.DISCONNECT), together=2),
        8_000,
        {"w1 stops in time", "w1 stops for a newer"},
    ),
    "cut off and another fault": World(
        Model(max_retry=1, cancellers=0, faults=(Fault.DISCONNECT, *QUICK), together=2),
        15_000,
        {"w0 reads again: DROP", "w1 crashes"},
    ),
    "the consumer is recreated": World(
        Model(max_retry=1, faults=(Fault.REDELIVERY,)),
        20_000,
        {"w0 adopts", "w1 naks", "the consumer is recreated"},
    ),
    "one id, two messages": World(Model(submitters=2), 40_000, {"s0 finds it taken", "s1 finds it taken"}),
}
LONG_WORLDS = {
    "cut off, crashed, unanswered": Model(faults=(Fault.DISCONNECT, Fault.CRASH, Fault.LOST_REPLY), together=2),
    "the consumer is recreated, and a quick fault": Model(faults=(Fault.REDELIVERY, *QUICK), together=2),
    "two cancellers, a retry and a quick fault": Model(max_retry=1, cancellers=2, faults=QUICK),
    "one id, two messages and a crash": Model(submitters=2, faults=(Fault.CRASH,)),
}

QUIET = Model(cancellers=0)
CANCELLED = Model(max_retry=1)
CUT_OFF = Model(faults=(Fault.DISCONNECT,))
TERMINAL_CHANGED = "a terminal state was changed"
TWO_RUNS = "two runs at once"
LATE_RUN = "a run was claimed and started after a cancel had returned"
UNTOLD = "a cancel returned, and a run goes on that was not told"
STUCK = "stuck: it can never settle"
BREAKS = {
    Broken.INTENT_READ_BEFORE_CLAIM: (Model(faults=(Fault.CRASH,)), LATE_RUN),
    Broken.INTENT_NEVER_READ_ON_CLAIM: (CANCELLED, UNTOLD),
    Broken.ACK_ON_DROP: (Model(cancellers=0, faults=(Fault.DISCONNECT, Fault.CRASH), together=2), STUCK),
    Broken.ACK_BEFORE_FINISH: (replace(QUIET, faults=(Fault.CRASH,)), STUCK),
    Broken.LATE_NAK_AFTER_GAP: (WORLDS["cut off twice"].model, TWO_RUNS),
    Broken.RUN_OUTLIVES_LEASE: (CUT_OFF, TWO_RUNS),
    Broken.RECONNECT_WITHOUT_INTENTS: (CUT_OFF, UNTOLD),
    Broken.ONE_DELIVERY_IN_MAP: (replace(QUIET, faults=(Fault.REDELIVERY,)), TWO_RUNS),
    Broken.CLAIM_AS_PLAIN_PUT: (CANCELLED, TERMINAL_CHANGED),
    Broken.FINISH_AS_PLAIN_PUT: (replace(QUIET, faults=(Fault.DISCONNECT,)), TERMINAL_CHANGED),
    Broken.PENDING_HAND_BACK: (Model(faults=(Fault.SHUTDOWN,)), "deleted, though it had started"),
    Broken.CANCEL_RETURNS_BEFORE_PUBACK: (CANCELLED, UNTOLD),
    Broken.NO_INTENT_WRITTEN: (CANCELLED, UNTOLD),
    Broken.ANNOUNCE_BEFORE_INTENT: (CANCELLED, UNTOLD),
    Broken.MESSAGE_DELETED_BEFORE_ENTRY: (Model(faults=(Fault.CRASH,)), STUCK),
    Broken.ENTRY_CREATED_AS_PLAIN_PUT: (QUIET, TERMINAL_CHANGED),
    Broken.CONFLICT_IS_ALWAYS_TAKEN: (replace(QUIET, faults=(Fault.CRASH,)), STUCK),
}


@cache
def exploration_of(model: Model) -> Exploration[State]:
    return model.explore()
