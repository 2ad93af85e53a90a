"""Commands for trying out and diagnosing nqnb: ``nqnb demo``, ``nqnb chaos`` and ``nqnb version``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import subprocess
from typing import TYPE_CHECKING

import click

from nqnb.commands.arguments import count_tasks, yes_option
from nqnb.commands.command import Command, front_of, options_of
from nqnb.commands.param_types import AtLeast, seconds
from nqnb.demo import DemoSummary, run_demo
from nqnb.errors import DevServerError, NqnbError
from nqnb.server.devserver import find_server
from nqnb.settings import Settings
from nqnb.testing.chaos.plan import ACK_WAIT_SECONDS, DEFAULT_FAULTS, FAULTS, FOREIGN_FAULTS, ChaosOptions
from nqnb.version import __version__

if TYPE_CHECKING:
    from nqnb.testing.chaos import ChaosReport

_SEEDS = 10**6
"""Without ``--seed``, a random seed below this number is chosen."""


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  nqnb demo
  nqnb -u nats://10.0.0.5:4222 demo
""",
)
@click.pass_context
def demo(ctx: click.Context) -> DemoSummary:
    """Run tasks, retries and cancels, and check the outcome.

    A worker hashes the files of this Python installation. One task fails twice and is retried, and another is scheduled
    for later. A task that never ends is cancelled while it is running, and another task is cancelled while it is
    waiting. The demo starts a temporary server. With -u, the demo uses your server instead, and creates new queues on
    that server. Exit code 0 means that every task ended as expected.
    """
    front = front_of(ctx)
    options = options_of(ctx)
    settings = Settings.of(None, **options) if options.keys() & {"url", "context"} else None
    with front.live() as show:
        return front.run(lambda: run_demo(settings, show))


def _faults(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise click.BadParameter(
            f"fault {unknown[0]!r} is unknown. Use one or more of these, separated by commas: {', '.join(FAULTS)}"
        )
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
@click.option(
    "--tasks",
    "-n",
    type=AtLeast(1),
    default=1000,
    metavar="N",
    show_default=True,
    help="Number of tasks to submit",
)
@click.option("--seed", type=AtLeast(0), metavar="S", help="Seed for all random choices  [random]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    metavar="M",
    help="Stop submitting tasks after M minutes  [10]",
)
@click.option(
    "--faults",
    callback=_faults,
    metavar="LIST",
    help=f"Faults to inject: any of {','.join(FAULTS)}  [all except cluster; with -u: {','.join(FOREIGN_FAULTS)}]",
)
@click.option(
    "--ack-wait", type=seconds, default=ACK_WAIT_SECONDS, metavar="SECONDS", help="Ack wait of the queues  [3]"
)
@yes_option
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
    """Inject faults while tasks run, and check the guarantees.

    Tasks are submitted, and are cancelled at various stages of their lives. Meanwhile, workers are killed and
    suspended, the server is killed, connections are cut, event loops are blocked, the store is filled, and the clocks
    of one worker and one client are off by an hour. With the fault `cluster`, the test runs on a cluster of three
    servers, which loses its leaders and its quorum. The command starts these servers and workers itself.

    With -u, the command tests your server instead, after you confirm. The test is then limited to load, cancels,
    blocked event loops and killed workers. The command uses only its own workers, queues and buckets, and removes them
    afterwards.

    At the end, the command checks every stored revision and the log of the handlers. If a guarantee was broken, the
    command shows the seed and the task's timeline, and the exit code is 1.
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
        question = f"Test {', '.join(settings.urls)} with {count_tasks(tasks)}, on new queues?"
        if not front.confirm(question):
            raise NqnbError("nothing was tested: you did not confirm. Answer y, or add --yes.")
    # nats is slow to import, and the other commands import it only when they connect.
    from nqnb.testing.chaos import run_chaos

    with front.live() as show:
        return front.run(lambda: run_chaos(plan, show))


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb version --json")
def version() -> dict[str, str]:
    """Show the versions of nqnb, Python, nats-py and nats-server."""
    return {
        "nqnb": __version__,
        "python": platform.python_version(),
        "nats-py": importlib.metadata.version("nats-py"),
        "nats-server": _server_version(),
    }


def _server_version() -> str:
    try:
        server = find_server()
        answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=5, check=True)  # noqa: S603 - the server that the user installed
    except (DevServerError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return f"{answer.stdout.strip().removeprefix('nats-server: v')} ({os.path.normpath(server)})"
