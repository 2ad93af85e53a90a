"""`nqnb demo` and `nqnb version`: what shows nqnb itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import click

from nqnb.commands.options import Command, front_of, options_of
from nqnb.demo import DemoSummary, run_demo
from nqnb.errors import DevServerError
from nqnb.server.devserver import find_server
from nqnb.settings import Settings
from nqnb.version import __version__


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
    """See tasks run, and two be cancelled.

    A worker hashes the files of this Python installation. One task fails twice and is retried, one waits for its time;
    one that never ends is cancelled while it runs, one while it waits. The server is a temporary one of its own, unless
    -u names one; there, the demo uses queues of its own. Exit code 0 says that every task ended as announced.
    """
    front = front_of(ctx)
    options = options_of(ctx)
    settings = Settings.of(None, **options) if options.keys() & {"url", "context"} else None
    with front.live() as show:
        return front.run(lambda: run_demo(settings, show))


@click.command(cls=Command, epilog="\b\nExample:\n  nqnb version --json")
def version() -> dict[str, str]:
    """Show the versions of nqnb and its parts."""
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
