"""What holds, whatever happens: the promises of the protocol, checked on every step."""

from __future__ import annotations

from nqnb.protocol.lifecycle import Ended
from nqnb.protocol.wire import Status

from .records import Link, Phase, Place
from .state import State

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
