"""The tree of all ``nqnb`` commands, and the top-level help."""

from __future__ import annotations

import click

from nqnb.commands import (
    check_command,
    diagnostic_commands,
    doctor_command,
    exporter_command,
    queue_commands,
    schedule_commands,
    server_commands,
    submit_command,
    task_commands,
    top_command,
    watch_command,
    worker_commands,
)
from nqnb.commands.command import Root, help_alone
from nqnb.version import __version__

_EPILOG = """\b
Try it without a server:
  nqnb demo

\b
Run a first task. Start the worker from `nqnb worker -h` in a second terminal:
  nqnb up --detach
  nqnb worker jobs:worker
  nqnb submit count 60
  nqnb watch
  nqnb cancel ID
  nqnb up --stop

\b
Exit codes: 0 done, 1 failed, 2 usage error, 3 no connection, 130 interrupted,
  141 the reader of the output exited
Completion: eval "$(_NQNB_COMPLETE=bash_source nqnb)"; zsh: zsh_source; fish: fish_source
"""


@click.group(
    cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="nqnb", message="%(prog)s %(version)s")
@click.pass_context
def tree(ctx: click.Context) -> str | None:
    """Submit, run, watch and cancel tasks of NQ queues on NATS JetStream, with guaranteed cancellation.

    The options below can also follow the name of any command, with four exceptions: --timeout has another meaning in
    `submit`, `schedule add` and `task result`, and --name has another meaning in `queue stats`. Set passwords and
    tokens in NATS_PASSWORD and NATS_TOKEN, because other users of the machine can read the command line.
    """
    return help_alone(ctx)


for command in (
    server_commands.up,
    diagnostic_commands.demo,
    submit_command.submit,
    task_commands.list_tasks,
    queue_commands.list_queues,
    worker_commands.list_workers,
    check_command.check,
    doctor_command.doctor,
    watch_command.watch,
    top_command.top,
    task_commands.cancel,
    task_commands.task,
    queue_commands.queue,
    schedule_commands.schedule,
    task_commands.prune,
    worker_commands.worker,
    exporter_command.exporter,
    diagnostic_commands.chaos,
    diagnostic_commands.version,
):
    tree.add_command(command)
