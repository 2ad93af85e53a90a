"""One command tree for every front door: the shell's `nqnb`, and whatever else can parse a line.

Commands return records (see `nqnb.records` and `nqnb.commands.records`) and leave it to the front door how these are
shown; what takes long speaks through the `Front` in ``ctx.obj`` meanwhile.
"""

from __future__ import annotations

import click

from nqnb.commands import about, queue, serve, submit, task
from nqnb.commands.front import Front
from nqnb.commands.options import Root, help_alone
from nqnb.version import __version__

__all__ = ["Front", "tree"]

_EPILOG = """\b
Try it, without a server of your own:
  nqnb demo
\b
A first task:
  nqnb up                          (leave it running)
  nqnb submit resize '{"path": "a.png"}'
  nqnb worker mymodule:worker
  nqnb task list
\b
Exit codes: 0 done, 1 refused, 2 usage, 3 no connection
Completion: eval "$(_NQNB_COMPLETE=bash_source nqnb)"
"""


@click.group(
    cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="nqnb", message="%(prog)s %(version)s")
@click.pass_context
def tree(ctx: click.Context) -> str | None:
    """NQ task queues on NATS JetStream: submit tasks, watch them, and cancel them for certain.

    The options below are accepted after a command, too. Passwords and tokens are better given in NATS_PASSWORD and
    NATS_TOKEN, where no list of processes shows them.
    """
    return help_alone(ctx)


for command in (serve.up, about.demo, submit.submit, task.task, queue.queue, serve.worker, about.version):
    tree.add_command(command)
