"""One command tree for every front door: the shell's `nqnb`, and whatever else can parse a line.

Commands return records (see `nqnb.records` and `nqnb.commands.records`) and leave it to the front door how these are
shown; what takes long speaks through the `Front` in ``ctx.obj`` meanwhile.
"""

from __future__ import annotations

import click

from nqnb.commands import about, cancel, chaos, look, prune, queue, serve, submit, task, up, watch
from nqnb.commands.front import Front, NeedsYes
from nqnb.commands.options import Root, help_alone
from nqnb.version import __version__

__all__ = ["Front", "NeedsYes", "tree"]

_EPILOG = """\b
Try it, without a server of your own:
  nqnb demo

\b
A first task:
  nqnb up --detach
  nqnb submit resize '{"path": "a.png"}'
  nqnb worker mymodule:worker
  nqnb watch

\b
Exit codes: 0 done, 1 refused, 2 usage, 3 no connection, 130 interrupted
Completion: eval "$(_NQNB_COMPLETE=bash_source nqnb)"
"""


@click.group(
    cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="nqnb", message="%(prog)s %(version)s")
@click.pass_context
def tree(ctx: click.Context) -> str | None:
    """NQ task queues on NATS JetStream: submit tasks, watch them, and cancel them for certain.

    The options below are accepted after a command, too; only --timeout of submit and task result, and --name of queue
    stats, mean something else there. Passwords and tokens are better given in NATS_PASSWORD and NATS_TOKEN, where no
    list of processes shows them.
    """
    return help_alone(ctx)


for command in (
    up.up,
    about.demo,
    submit.submit,
    look.tasks,
    look.queues,
    look.workers,
    watch.watch,
    cancel.cancel,
    task.task,
    queue.queue,
    prune.prune,
    serve.worker,
    chaos.chaos,
    about.version,
):
    tree.add_command(command)
