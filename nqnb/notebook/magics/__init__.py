"""The magics `%nq` and `%%nq`: parsing, commands, and the results that they return to a cell."""
