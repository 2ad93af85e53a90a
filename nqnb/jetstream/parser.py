"""nats-py's parser, made safe for subjects with vertical tabs and form feeds.

A server takes every byte in a subject that is no space, tab or line end, and passes it on. nats-py's parser takes a
vertical tab and a form feed for a space, too: it hangs up on such a line, or reads another subscription and another
size out of it. One such key in a bucket would end every connection that lists the bucket.
"""

from __future__ import annotations

import re

from nats.protocol.parser import AWAITING_MSG_PAYLOAD, Parser

_HIDDEN_SPACE = re.compile(rb"[\x0b\x0c]")
_LINE_END = b"\r\n"


class SafeParser(Parser):
    """Replaces these bytes in control lines; payloads stay as they are."""

    async def parse(self, data: bytes = b"") -> None:
        """See `nats.protocol.parser.Parser.parse`."""
        if not any(byte in some for byte in (b"\x0b", b"\x0c") for some in (data, self.buf)):
            await super().parse(data)
            return
        # Line by line, for the parser goes on through all that it has.
        held, at = bytes(self.buf) + data, 0
        self.buf.clear()
        while at < len(held):
            if self.state == AWAITING_MSG_PAYLOAD:
                end = at + self.needed + len(_LINE_END)
                part = held[at:end]
            else:
                found = held.find(_LINE_END, at)
                end = found + len(_LINE_END) if found >= 0 else len(held)
                part = held[at:end] if found < 0 else _HIDDEN_SPACE.sub(b"?", held[at:end])
            at = end
            await super().parse(part)


def is_known(parser: object) -> bool:
    """Return whether a client's parser is one that `SafeParser` can stand in for."""
    return type(parser) is Parser and all(hasattr(parser, name) for name in ("buf", "state", "needed"))
