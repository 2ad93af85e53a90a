"""The commands of nqnb, which are the same in the shell (``nqnb``) and in a notebook (``%nq``).

Commands return records (see `nqnb.records` and `nqnb.commands.command_records`). The front end displays these records.
A long-running command reports its progress through ``ctx.obj``, which is a `nqnb.commands.command.Front`.
"""
