"""The commands of nqnb, which the shell (``nqnb``) and the notebook (``%nq``) share.

Commands return records (see `nqnb.records` and `nqnb.commands.command_records`), and the front end shows them. A
long-running command reports its progress through the `nqnb.commands.command.Front` in ``ctx.obj``.
"""
