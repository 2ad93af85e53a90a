"""One command tree for every front door: the shell's `nqnb` and whatever else can parse a line.

Commands return records (see `nqnb.records` and `nqnb.commands.records`) and leave it to the front door how these are
shown; what takes long speaks through the `Front` in ``ctx.obj`` meanwhile.
"""

from __future__ import annotations

import click

from nqnb.commands.about import demo, version
from nqnb.commands.base import Front, Group, options_of
from nqnb.commands.queue import queue
from nqnb.commands.records import Queues, Receipts, ServerUp, Submitted, Tasks, TaskStatus, Value
from nqnb.commands.serve import UserCodeError, up, worker
from nqnb.commands.submit import submit
from nqnb.commands.task import task
from nqnb.version import __version__

__all__ = [
    "Front",
    "Queues",
    "Receipts",
    "ServerUp",
    "Submitted",
    "TaskStatus",
    "Tasks",
    "UserCodeError",
    "Value",
    "options_of",
    "tree",
]

_EPILOG = """\b
Try it, without a server of your own:
  nqnb demo
\b
A first task:
  nqnb up                              (in another terminal)
  nqnb submit resize '{"path": "a.png"}'
  nqnb worker mymodule:worker
  nqnb task list
\b
Exit codes: 0 done, 1 refused, 2 usage, 3 no connection.
Completion: eval "$(_NQNB_COMPLETE=bash_source nqnb)"
"""


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="nqnb", message="%(prog)s %(version)s")
def tree() -> None:
    """NQ task queues on NATS JetStream: submit tasks, watch them, and cancel them for certain.

    The options below are also accepted after a command. User, password and token are better given as NATS_USER,
    NATS_PASSWORD and NATS_TOKEN, where no process list shows them.
    """


for command in (up, demo, submit, task, queue, worker, version):
    tree.add_command(command)
