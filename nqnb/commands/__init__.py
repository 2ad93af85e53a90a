"""The commands of nqnb, which the shell (``nqnb``) and the notebook (``%nq``) share.

Commands return records (see `nqnb.records` and `nqnb.commands.command_records`); the front end shows them. A command
that takes long reports its progress through the `nqnb.commands.command.Front` in ``ctx.obj``.
"""
