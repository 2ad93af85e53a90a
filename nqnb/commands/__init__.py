"""The commands of nqnb, which the shell (``nqnb``) and the notebook (``%nq``) share.

Commands return records (see `nqnb.records` and `nqnb.commands.command_records`), which the front end shows. A
long-running command reports progress through the `nqnb.commands.command.Front` in ``ctx.obj``.
"""
