"""The ways to break the protocol: each is one step reordered, weakened or left out."""

from __future__ import annotations

import enum


class Broken(enum.Enum):
    """What is broken; the name says how."""

    NOTHING = "as it ships"
    INTENT_READ_BEFORE_CLAIM = "a worker reads the intent before its claim instead of after"
    INTENT_NEVER_READ_ON_CLAIM = "a worker leaves the intent to its heartbeats"
    ACK_ON_DROP = "a superseded worker acks instead of dropping"
    ACK_BEFORE_FINISH = "a worker acks, then writes the outcome"
    LATE_NAK_AFTER_GAP = "a worker that was cut off puts back what it drops"
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
