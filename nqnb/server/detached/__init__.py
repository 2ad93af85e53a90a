"""The detached dev server: one a user, found by every shell and notebook of theirs, until it is stopped.

All that concerns it lies in a folder that only its user may enter::

    detached/lock              held by the keeper (`nqnb.server.supervisor`) for as long as it, and so the server, lives
    detached/run/server.json   where the server is, its identity and its token; it exists while the server should run
    detached/run/…             the server's configuration and log
    detached/store             the streams, unless another place was named; they stay

The server listens on 127.0.0.1 alone and wants the token, which stands in these files and nowhere else. It is taken for
ours only while the lock is held, and when it has the identity and takes the token of the file: what listens at a port
that was ours once is never joined. Windows has no such lock; there, identity and token must do.
"""

from __future__ import annotations

from nqnb.server.detached.choice import Choice, choose
from nqnb.server.detached.files import Detached, home
from nqnb.server.detached.run import start, stop
from nqnb.server.detached.state import Condition, Look, find, look

__all__ = ["Choice", "Condition", "Detached", "Look", "choose", "find", "home", "look", "start", "stop"]
