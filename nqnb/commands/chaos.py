"""`nqnb chaos`: attack a server and workers of one's own, or those of a given server, and judge what happened."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import click

from nqnb.commands.arguments import tasks as how_many
from nqnb.commands.arguments import the_yes
from nqnb.commands.options import Command, front_of, options_of
from nqnb.commands.values import seconds
from nqnb.errors import NqnbError
from nqnb.settings import Settings
from nqnb.testing.chaos.plan import ACK_WAIT_SECONDS, DEFAULT_FAULTS, FAULTS, FOREIGN_FAULTS, ChaosOptions

if TYPE_CHECKING:
    from nqnb.testing.chaos import ChaosReport

_SEEDS = 10**6


def _faults(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is unknown; use {', '.join(FAULTS)}, with commas between them")
    return names


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb chaos
  nqnb chaos --tasks 5000 --seed 1
  nqnb chaos --faults cluster,worker
  nqnb chaos --faults '' --tasks 200
  nqnb -u nats://10.0.0.5:4222 chaos --tasks 500
""",
)
@click.option("--tasks", "-n", type=click.IntRange(1), default=1000, metavar="N", show_default=True, help="Submit N")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Draw all from this seed  [a new one]")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=10.0, metavar="M", help="Submit for M at most  [10]"
)
@click.option(
    "--faults",
    callback=_faults,
    metavar="LIST",
    help=f"Of {','.join(FAULTS)}  [all but cluster; with -u {','.join(FOREIGN_FAULTS)}]",
)
@click.option("--ack-wait", type=seconds, default=ACK_WAIT_SECONDS, metavar="SECONDS", help="Of the queues  [3]")
@the_yes
@click.pass_context
def chaos(
    ctx: click.Context,
    tasks: int,
    seed: int | None,
    minutes: float,
    faults: tuple[str, ...] | None,
    ack_wait: float,
    yes: bool,
) -> ChaosReport:
    """Attack nqnb, and judge whether it keeps its promises.

    Tasks are submitted, and cancelled at every moment of their lives, while faults happen: workers are killed and
    suspended, the server is killed, links are cut, event loops are blocked, the store is filled, and the clocks of a
    worker and of a client are an hour off. With `cluster` among the faults there are three servers, which lose their
    leaders and their quorum. The servers and workers are its own.

    With -u it attacks the server there, after a question: with load, cancels and kills of its own workers only, on
    queues and buckets of its own, which it removes in the end.

    Then every stored revision and the handlers' own log are judged. For what broke a rule, the seed and the task's
    timeline are shown, and the exit code is 1.
    """
    front = front_of(ctx)
    options = options_of(ctx)
    settings = Settings.of(None, **options) if options.keys() & {"url", "context"} else None
    if faults is None:
        faults = DEFAULT_FAULTS if settings is None else FOREIGN_FAULTS
    plan = ChaosOptions(
        tasks=tasks,
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
        minutes=minutes,
        faults=faults,
        settings=settings,
        ack_wait=ack_wait,
    )
    if settings is not None and not yes:
        question = f"Attack {', '.join(settings.urls)} with {how_many(tasks)}, on queues of its own?"
        if not front.confirm(question):
            raise NqnbError("nothing was attacked, as that was not confirmed")
    # nats takes its time to import, which no other command need wait for.
    from nqnb.testing.chaos import run_chaos

    with front.live() as show:
        return front.run(lambda: run_chaos(plan, show))
