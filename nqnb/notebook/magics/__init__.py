"""`%nq` and `%%nq`: their lines, their commands, and what a cell gets of them."""
