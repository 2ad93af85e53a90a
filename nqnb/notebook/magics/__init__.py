"""The magics `%nq` and `%%nq`: the parser, the commands, and the results that commands return to a cell."""
