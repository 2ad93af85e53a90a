"""The result of an examination: findings, each with a stable code, a problem and a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from msgspec import Struct

from nqnb.error_text import readable, shown
from nqnb.errors import BadInput, NqnbError
from nqnb.inputs import check_choice

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

CODES: dict[str, Severity] = {
    "no-message": "error",
    "no-entry": "warning",
    "bad-entry": "error",
    "lost-worker": "warning",
    "stuck-cancel": "warning",
    "no-worker": "error",
    "idle-schedule": "warning",
    "paused": "note",
    "no-consumer": "error",
    "no-cancel-stream": "error",
    "short-ack-wait": "warning",
    "loses-tasks": "error",
    "one-replica": "warning",
    "near-limit": "warning",
    "clock-skew": "warning",
    "old-server": "note",
}
"""The severity of each code. Codes are never renamed."""
SAFE_FIXES = frozenset(("no-message", "no-entry", "no-consumer", "no-cancel-stream"))
"""The codes of the findings that `nqnb.doctor.treatment` repairs."""
_NAMED_IDS = 3


class Finding(Struct, frozen=True, kw_only=True):
    """An inconsistency or a risk.

    Attributes:
        code: the stable code, such as ``no-worker``. The page docs/doctor.md describes each code.
        problem: what is wrong and why it matters.
        remedy: what to do, usually with a command to copy.
        queue: the queue, or an empty string if the finding concerns the whole server.
        ids: the ids of all affected tasks, or the names of the affected entries, schedules, streams or servers. The
            list may be empty.

    Examples:
        >>> task = await nq.submit("mail", {"to": "a@example.org"})
        >>> [finding] = (await nq.doctor("mail")).findings
        >>> finding
        <Finding no-worker in mail: 1 task is waiting, but no worker is serving the queue.>
        >>> print(finding.remedy)
        Start a worker with `nqnb worker MODULE:WORKER`. ...
    """

    code: str
    problem: str
    remedy: str
    queue: str = ""
    ids: list[str] = []

    def __repr__(self) -> str:
        where = f" in {readable(self.queue)}" if self.queue else ""
        return f"<Finding {self.code}{where}: {readable(self.problem, 100)}>"

    @property
    def severity(self) -> Severity:
        """``error`` if tasks do not run, ``warning`` for a risk, or ``note`` for a state that may be intended."""
        return CODES[self.code]

    @property
    def fixable(self) -> bool:
        """Whether `nqnb doctor --fix` repairs the problem."""
        return self.code in SAFE_FIXES

    @property
    def some_ids(self) -> str:
        """The first ids and the number of further ids, as text. The text is empty if there are no ids."""
        named = ", ".join(readable(each) for each in self.ids[:_NAMED_IDS])
        more = len(self.ids) - _NAMED_IDS
        return f"{named} and {more:,} more" if more > 0 else named

    def as_json(self) -> dict[str, Any]:
        """Return the fields, the severity and the number of ids as a dict for JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "queue": self.queue or None,
            "count": len(self.ids),
            "ids": self.ids,
            "problem": self.problem,
            "remedy": self.remedy,
            "fixable": self.fixable,
        }


class Diagnosis(Struct, frozen=True, kw_only=True):
    """The result of an examination; see `nqnb.Client.doctor`.

    Attributes:
        server: the version of the server.
        queues: the number of queues that were examined.
        tasks: the number of tasks that were examined.
        messages: the number of messages that were examined.
        seconds: the duration of the examination.
        findings: the findings, with the errors first. The list is empty if no problem was found.
        fixed: the findings that were repaired before this examination.
        errors: an error for each repair that failed.

    Examples:
        >>> diagnosis = await nq.doctor("resize")
        >>> diagnosis.ok
        True
        >>> print(diagnosis)
        no findings in 1 queue, ... on nats-server 2...
    """

    server: str
    queues: int
    tasks: int
    messages: int
    seconds: float
    findings: list[Finding]
    fixed: list[Finding] = []
    errors: list[NqnbError] = []

    def __repr__(self) -> str:
        codes = ", ".join(dict.fromkeys(each.code for each in self.findings)) or "no findings"
        return f"<Diagnosis: {codes}>"

    def __str__(self) -> str:
        """Return the findings, the repairs and a summary as multi-line text."""
        parts = []
        for each in self.findings:
            where = f" {readable(each.queue)}" if each.queue else ""
            ids = f"\n  {each.some_ids}" if each.ids else ""
            parts.append(f"{each.severity} {each.code}{where}\n  {each.problem}{ids}\n  Remedy: {each.remedy}\n")
        return "\n".join((*parts, *self.fixes, self.summary))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the findings below a cell. Commands begin with ``%nq`` instead of ``nqnb``, except ``nqnb worker``."""
        printer.text(re.sub(r"`nqnb (?!worker )", "`%nq ", str(self)))

    @property
    def ok(self) -> bool:
        """True if there are no findings and no repair failed."""
        return not self.findings and not self.errors

    @property
    def fixable(self) -> list[Finding]:
        """The findings that `nqnb doctor --fix` repairs."""
        return [each for each in self.findings if each.fixable]

    @property
    def summary(self) -> str:
        """One line that states the number of findings, and how many queues, tasks and messages were examined."""
        count = len(self.findings)
        found = "no findings" if not count else "1 finding" if count == 1 else f"{count:,} findings"
        examined = (_count(self.queues, "queue"), _count(self.tasks, "task"), _count(self.messages, "message"))
        fixable = len(self.fixable)
        fix = f"; `nqnb doctor --fix` repairs {'it' if count == 1 else f'{fixable:,} of them'}" if fixable else ""
        return f"{found} in {', '.join(examined)} on nats-server {self.server}{fix}"

    @property
    def fixes(self) -> list[str]:
        """A line of text for each repaired finding."""
        return [f"fixed {each.code}{f' of {each.queue}' if each.queue else ''}: {_done(each)}" for each in self.fixed]

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON; see `Finding.as_json` for the findings."""
        return {
            "ok": self.ok,
            "server": self.server,
            "queues": self.queues,
            "tasks": self.tasks,
            "messages": self.messages,
            "seconds": round(self.seconds, 3),
            "findings": [each.as_json() for each in self.findings],
            "fixed": [each.as_json() for each in self.fixed],
            "errors": self.errors,
        }


def check_codes(ignore: str | Iterable[str]) -> frozenset[str]:
    """Validate the codes to ignore, and return them as a set. Raise `BadInput` if a code is unknown."""
    try:
        given = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    except Exception:  # noqa: BLE001  the caller's object may raise anything
        raise BadInput(
            f"ignore={shown(ignore)} is invalid: expected a list of codes, such as ['old-server']."
        ) from None
    return frozenset(check_choice("ignore", code, CODES) for code in given)


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def _done(finding: Finding) -> str:
    tasks = _count(len(finding.ids), "task")
    return {
        "no-message": f"marked {tasks} without a message as ended",
        "no-entry": f"wrote the missing state of {tasks}",
        "no-consumer": "created the consumer",
        "no-cancel-stream": "created the cancel stream",
    }[finding.code]
