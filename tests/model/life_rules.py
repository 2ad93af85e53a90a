"""The rules that every step must keep, and the ways to break the protocol that the explorer must catch."""

from __future__ import annotations

import enum

from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Status

from .life_state import Link, Phase, Place, State


class Broken(enum.Enum):
    """What is broken; the name says how."""

    NOTHING = "as it ships"
    INTENT_READ_BEFORE_CLAIM = "a worker reads the intent before its claim instead of after"
    INTENT_NEVER_READ_ON_CLAIM = "a worker leaves the intent to its heartbeats"
    ACK_ON_DROP = "a superseded worker acks instead of dropping"
    ACK_BEFORE_FINISH = "a worker acks, then writes the outcome"
    LATE_NAK_AFTER_GAP = "a worker that was cut off naks what it drops"
    RUN_OUTLIVES_LEASE = "a run goes on without heartbeats"
    RECONNECT_WITHOUT_INTENTS = "a worker that was cut off does not read the intents it may have missed"
    ONE_DELIVERY_IN_MAP = "a second delivery takes the place of the first in the running map"
    CLAIM_AS_PLAIN_PUT = "a claim is written over whatever is there"
    FINISH_AS_PLAIN_PUT = "an outcome is written over whatever is there"
    PENDING_HAND_BACK = "a worker that shuts down writes Pending over its claim"
    CANCEL_RETURNS_BEFORE_PUBACK = "a cancel returns before its announcement is answered"
    NO_INTENT_WRITTEN = "a cancel only announces"
    ANNOUNCE_BEFORE_INTENT = "a cancel announces, then writes the intent"
    MESSAGE_DELETED_BEFORE_ENTRY = "a cancel deletes the message, then writes Deleted"
    ENTRY_CREATED_AS_PLAIN_PUT = "a submit writes Pending over whatever is there"
    CONFLICT_IS_ALWAYS_TAKEN = "a submit that finds an entry takes back its message"


_CLAIMED = (Phase.START, Phase.RUN)


def broken_rule(before: State, after: State) -> str:
    """The rule that the step breaks, or ``""``."""
    if after.entry is not before.entry and (rule := _broken_by_write(before, after)):
        return rule
    runs = [(one, worker) for worker in after.workers for one in worker.deliveries if one.phase in _CLAIMED]
    if not runs:
        return ""
    if sum(one.phase is Phase.RUN for one, _ in runs) > 1:
        return "two runs at once"
    if after.cancel_returned:
        if any(one.phase is Phase.RUN and one.late for one, _ in runs):
            return "a run was claimed and started after a cancel had returned"
        # A worker that was cut off reads the intents before it counts as up again.
        if any(not one.flagged and not worker.inbox and worker.link is Link.UP for one, worker in runs):
            return "a cancel returned, and a run goes on that was not told"
    return ""


def _broken_by_write(before: State, after: State) -> str:
    old, new = before.entry, after.entry
    if new is None or (old and old.status.terminal):
        return "a terminal state was changed"
    if old and new.sequence != old.sequence:
        return "another message took the task over"
    if new.status is Status.DELETED and after.started:
        return "deleted, though it had started"
    ends = {one.ended for worker in before.workers for one in worker.deliveries if one.claim == new.claim}
    if new.status is Status.COMPLETED and Ended.RETURNED not in ends:
        return "completed, though no run of that claim returned"
    if new.status is Status.FAILED and Ended.FAILED not in ends:
        return "failed, though no run of that claim did"
    if new.status is Status.CANCELLED and Ended.RETURNED in ends:
        return "cancelled, though the run of that claim returned"
    return ""


def settled(state: State) -> bool:
    """All is over: the entry is terminal, no message is left, nobody is at work."""
    return (
        state.entry is not None
        and state.entry.status.terminal
        and all(place is Place.GONE for place in state.messages)
        and not any(worker.deliveries for worker in state.workers)
        and all(who.over for who in (*state.submitters, *state.cancellers))
    )
