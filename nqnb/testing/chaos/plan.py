"""The options and the plan of an attack. The same options, including the seed, always produce the same plan."""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from nqnb.error_text import kind_of, shown
from nqnb.errors import BadInput
from nqnb.inputs import check_count, check_seconds
from nqnb.queue_limits import QueueLimits
from nqnb.settings import Settings

FAULTS = ("worker", "server", "link", "block", "full", "clock", "cluster")
"""All kinds of faults."""
DEFAULT_FAULTS = FAULTS[:-1]
"""All kinds of faults that are possible with a single server."""
FOREIGN_FAULTS = ("worker", "block")
"""The kinds of faults that can be injected when the attack uses the user's server."""

MOST_TASKS, MOST_WORKERS, MOST_SEED = 1_000_000_000, 1_000, 2**63 - 1
"""The maximum values of the options."""
ACK_WAIT_SECONDS = 3.0
PATIENT_SECONDS = 1.0
"""The pause, in seconds, before a failed task in the patient queue is retried."""
FAR_DELAY_SECONDS = 0.1
"""The delay, in seconds, that one worker's link adds in each direction."""


SCHEDULE = "nqnb-chaos"
"""The name of the schedule that submits a recurring task during the attack."""
FIRING_PERIOD_SECONDS = 1


class Moment(enum.Enum):
    """The point in a task's life at which the task is cancelled."""

    SUBMIT = "before submit returns"
    PENDING = "pending"
    CLAIM = "at the claim"
    STARTED = "just started"
    RUNNING = "running"
    RETRY = "waiting for a retry"
    FINISH = "at the finish"
    ENDED = "after the end"


class Kind(enum.Enum):
    """A kind of handler. Each kind has a separate queue."""

    COROUTINE = "coroutine"
    THREAD = "thread"
    PROCESS = "process"
    PATIENT = "patient"
    """A coroutine handler with a long pause before each retry."""
    NARROW = "narrow"
    """A coroutine handler of a queue with a concurrency limit."""
    PACED = "paced"
    """A coroutine handler of a queue with a rate limit."""


LIMITS = {Kind.NARROW: QueueLimits(concurrency=3), Kind.PACED: QueueLimits(rate=3)}
"""The limits of the queues, by kind of handler. The queues of the other kinds have no limits."""


@dataclass(frozen=True)
class ChaosOptions:
    """The options of an attack.

    Args:
        tasks: the number of tasks to submit.
        seed: the seed for the random choice of tasks, cancel calls and faults.
        minutes: the number of minutes after which no more tasks are submitted.
        faults: the kinds of faults to inject; see `FAULTS`.
        settings: the settings for a connection to the server to attack. By default, the attack starts one server, or
            three servers if ``faults`` contains ``cluster``.
        workers: the number of worker processes.
        concurrency: the number of tasks that each worker process can run at the same time.
        ack_wait: the ack wait of the queues, in seconds.
        prelude: the name of a function, as ``module:function``, that each worker process calls before it creates its
            worker.

    Raises:
        BadInput: an option is invalid.
    """

    tasks: int = 1000
    seed: int = 1
    minutes: float = 10.0
    faults: tuple[str, ...] = DEFAULT_FAULTS
    settings: Settings | None = None
    workers: int = 3
    concurrency: int = 16
    ack_wait: float = ACK_WAIT_SECONDS
    prelude: str = ""

    def __post_init__(self) -> None:
        check_count("tasks", self.tasks, 1, MOST_TASKS, "the number of tasks to submit")
        check_count("seed", self.seed, 0, MOST_SEED, "a seed")
        check_count("workers", self.workers, 2, MOST_WORKERS, "the number of worker processes")
        check_count("concurrency", self.concurrency, 1, MOST_TASKS, "the number of tasks to run at once")
        object.__setattr__(self, "ack_wait", check_seconds("ack_wait", self.ack_wait, positive=True))
        if isinstance(self.minutes, bool) or not isinstance(self.minutes, (int, float)) or not self.minutes > 0:
            raise BadInput(f"minutes={shown(self.minutes)} is invalid: must be a number greater than 0.")
        if isinstance(self.faults, str) or not isinstance(self.faults, Collection):
            raise BadInput(
                f"faults={shown(self.faults)} is invalid: expected a tuple of names, got {kind_of(self.faults)}. "
                f"Use one or more of {', '.join(FAULTS)}."
            )
        unknown = [each for each in self.faults if each not in FAULTS]
        if unknown:
            raise BadInput(
                f"faults are invalid: {shown(unknown[0])} is unknown. Use one or more of {', '.join(FAULTS)}."
            )
        if self.settings is not None and not isinstance(self.settings, Settings):
            raise BadInput(
                f"settings={shown(self.settings)} is invalid: expected a Settings object, got "
                f"{kind_of(self.settings)}. Pass Settings(url), or None for servers that the attack starts."
            )
        elsewhere = sorted(set(self.faults) - set(FOREIGN_FAULTS))
        if self.settings is not None and elsewhere:
            raise BadInput(
                f"faults are invalid: {elsewhere[0]!r} can be injected only into servers that the attack starts. "
                f"For your own server, use only the faults {' and '.join(map(repr, FOREIGN_FAULTS))}."
            )


@dataclass(frozen=True)
class CancelPlan:
    """A planned cancel call: the target moment, the delay before the call in seconds, and the client's number."""

    aim: Moment
    after: float
    client: int


@dataclass(frozen=True)
class TaskPlan:
    """A planned task: how the task's handler behaves, and when the task is cancelled."""

    number: int
    kind: Kind
    seconds: float
    failures: int = 0
    """The number of attempts that fail, counted from the first attempt."""
    retry: int = 0
    wait: float = 0.0
    """The number of seconds between the task's submission and its due time."""
    polite: bool = True
    """Whether a handler in a thread or process calls ``job.raise_if_cancelled()``."""
    progress: bool = False
    block: float = 0.0
    """The number of seconds for which the handler blocks the event loop."""
    chosen: bool = False
    """Whether the client passes an id when submitting the task."""
    client: int = 0
    """The number of the client that submits the task."""
    serial: str = ""
    """The serial key of the task."""
    cancels: tuple[CancelPlan, ...] = field(default_factory=tuple)

    @property
    def told(self) -> str:
        """A short description of the task, which omits default values."""
        unusual = {
            f"planned failures: {self.failures}": self.failures,
            f"retries: {self.retry}": self.retry,
            f"due in {self.wait:.2f} s": self.wait,
            f"blocks its event loop for {self.block:.2f} s": self.block,
            "never checks for its cancel": not self.polite,
            f"serial key {self.serial}": self.serial,
        }
        return ", ".join(
            [f"{self.kind.value}, {self.seconds:.3f} s", *(text for text, holds in unusual.items() if holds)]
        )

    @property
    def payload(self) -> dict[str, object]:
        """The task's payload: the instructions for the handler."""
        return {
            "kind": self.kind.value,
            "seconds": self.seconds,
            "failures": self.failures,
            "polite": self.polite,
            "progress": self.progress,
            "block": self.block,
        }


_AIMS = {each: 2 if each in (Moment.CLAIM, Moment.STARTED) else 1 for each in Moment}
_KINDS = {Kind.COROUTINE: 52, Kind.THREAD: 32, Kind.PATIENT: 13, Kind.PROCESS: 3}
_LIMITED_EVERY, _LIMITED_IN_A_ROW, _LIMITED_FROM = 200, 20, {Kind.PACED: 25, Kind.NARROW: 55}
"""Every 200 tasks contain 20 consecutive tasks for each queue with limits, so that these limits are reached."""
_SERIAL_ONE_IN, _SERIAL_KEYS = 8, 3
"""One task in `_SERIAL_ONE_IN` has a serial key, and `_SERIAL_KEYS` different serial keys are used."""
_BLOCKS_ONE_IN = 400
"""On average, one in `_BLOCKS_ONE_IN` tasks blocks the event loop. At least two tasks per attack do so."""


def plan_tasks(options: ChaosOptions, clients: int) -> Iterator[TaskPlan]:
    """Generate the tasks in order of submission.

    Args:
        options: the options of the attack.
        clients: the number of clients that submit and cancel tasks.
    """
    dice = random.Random(f"tasks {options.seed}")
    blocks = max(2, options.tasks // _BLOCKS_ONE_IN) if "block" in options.faults else 0
    blocking = {round((each + 0.5) * options.tasks / blocks) for each in range(blocks)}
    for number in range(options.tasks):
        if number in blocking:
            # This is longer than the ack wait. A worker that renewed its leases only on this loop would lose them.
            seconds = options.ack_wait * dice.uniform(1.2, 1.5)
            yield TaskPlan(number, Kind.COROUTINE, 0.0, block=seconds)
        else:
            yield _draw(dice, number, options, clients)


def _draw(dice: random.Random, number: int, options: ChaosOptions, clients: int) -> TaskPlan:
    kind = _limited_kind(number) or dice.choices(list(_KINDS), list(_KINDS.values()))[0]
    aims = dice.choices([0, 1, 2], [45, 45, 10])[0]
    moments = dice.choices(list(_AIMS), list(_AIMS.values()), k=aims)
    seconds = dice.choices(
        [0.0, dice.uniform(0, 0.06), dice.uniform(0.1, 1), dice.uniform(1, 2 * options.ack_wait)], [20, 50, 26, 4]
    )[0]
    if kind is Kind.PROCESS:
        seconds = min(seconds, 1.0)
    if {Moment.CLAIM, Moment.STARTED} & set(moments) and dice.random() < 0.7:
        # Long enough to detect that a cancel was not received.
        seconds = dice.uniform(1.2, 2.0)
    elif Moment.RUNNING in moments:
        seconds = max(seconds, dice.uniform(0.2, 0.6))
    failures = dice.choices([0, 1, 2], [8, 2, 1])[0]
    retry = dice.choice([0, 1, 2])
    if Moment.RETRY in moments or kind is Kind.PATIENT:
        failures, retry, seconds = max(1, failures), max(1, retry), min(seconds, 0.3)
    wait = dice.choices([0.0, dice.uniform(0.05, 0.4), dice.uniform(0.4, 2)], [85, 10, 5])[0]
    if Moment.PENDING in moments:
        wait = dice.choice([0.0, dice.uniform(0.1, 1)])
    return TaskPlan(
        number,
        kind,
        seconds,
        failures,
        retry,
        wait,
        polite=dice.random() < 0.6,
        progress=dice.random() < 0.2,
        chosen=Moment.SUBMIT in moments or dice.random() < 0.05,
        client=dice.randrange(clients),
        serial="" if number % _SERIAL_ONE_IN else f"key-{number // _SERIAL_ONE_IN % _SERIAL_KEYS}",
        cancels=tuple(CancelPlan(each, _after(dice, each, seconds, wait), dice.randrange(clients)) for each in moments),
    )


def _limited_kind(number: int) -> Kind | None:
    """Return the kind of a task if the task goes to a queue with limits, otherwise None."""
    place = number % _LIMITED_EVERY
    return next((kind for kind, first in _LIMITED_FROM.items() if 0 <= place - first < _LIMITED_IN_A_ROW), None)


def _after(dice: random.Random, aim: Moment, seconds: float, wait: float) -> float:
    """Return a random delay, in seconds, after which a cancel call is likely to hit the target moment ``aim``."""
    if aim is Moment.SUBMIT:
        return dice.choice([dice.uniform(0, 0.004), dice.uniform(0, 0.1)])
    if aim is Moment.PENDING:
        return dice.uniform(0, max(0.002, 0.9 * wait))
    if aim is Moment.CLAIM:
        return dice.choice([0.0, dice.uniform(0, 0.003)])
    if aim is Moment.STARTED:
        return dice.uniform(0.003, 0.03)
    if aim is Moment.RUNNING:
        return seconds * dice.uniform(0.2, 0.8)
    if aim is Moment.RETRY:
        return dice.choice([0.0, dice.uniform(0, 0.8 * PATIENT_SECONDS)])
    if aim is Moment.FINISH:
        return max(0.0, seconds + dice.uniform(-0.002, 0.006))
    return dice.uniform(0, 0.3)
