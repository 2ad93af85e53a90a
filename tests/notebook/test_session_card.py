"""The card of a session, in HTML and as text: what it shows, and which secrets it hides."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from helpers.waiting import until

import nqnb
from nqnb.notebook import session_card
from nqnb.notebook.kernel_worker import Local
from nqnb.notebook.session import Session


class Printer:
    """Collects the text of `_repr_pretty_`."""

    said = ""

    def text(self, text: str) -> None:
        self.said += text


def as_text(session: Session) -> str:
    printer = Printer()
    session._repr_pretty_(printer, False)
    return printer.said


@pytest.fixture
def session(server: nqnb.DevServer) -> Iterator[Session]:
    made = nqnb.session(server.url)
    yield made
    made.down()


def test_the_card_shows_server_queues_and_workers(session: Session, server: nqnb.DevServer) -> None:
    @session.handler("resize", concurrency=3)
    def resize(job: nqnb.Job) -> None: ...

    session.submit("scale", 1)
    session.pause("scale")
    worker = session.local["resize"].info.id
    text, page = as_text(session), session._repr_html_()
    for said in (text, page):
        assert server.url in said
        assert f"nats-server {server.version} (the one given)" in said
        assert re.search(r"JetStream.* k?B on disk.*\d+ streams", said, re.DOTALL)
        assert "bucket nq-store, 1 task" in said
        assert "scale: 1 pending, 0 processing, 0 workers (paused)" in said
        assert "resize: 0 pending, 0 processing, 1 worker" in said
        assert worker in said
        assert "resize (thread, 3 at once), idle" in said
    assert repr(session) == f"<Session {server.url}, server {server.version}>"


def test_the_card_lists_at_most_eight_queues(session: Session) -> None:
    for number in range(11):
        session.submit(f"q{number:02}")
    said = as_text(session)
    assert "q07" in said
    assert "q08" not in said
    assert "and 3 more" in said


def test_the_card_shows_no_secrets() -> None:
    config = 'authorization { users: [ {user: "ann", password: "hush-hush"} ] }'
    with nqnb.DevServer(config=config) as server:
        with pytest.raises(nqnb.NoServer):  # the password is needed
            nqnb.session(server.url)
        nq = nqnb.session(server.url.replace("//", "//ann:hush-hush@"))
        try:
            said = as_text(nq) + nq._repr_html_() + repr(nq) + nq.why + str(vars(nq))
        finally:
            nq.down()
    assert "nats-server" in said
    assert "hush" not in said


def test_a_missing_server_is_reported_without_delay(session: Session, server: nqnb.DevServer) -> None:
    version = server.version
    session.submit("resize")
    server.kill()
    until(lambda: not session.connected)
    began = time.monotonic()
    for said in (as_text(session), session._repr_html_()):
        assert "not connected: the server is down" in said
        assert f"nats-server {version}" in said
        assert "queues" not in said
    assert time.monotonic() - began < 9
    server.restart()


class Shape(HTMLParser):
    """Collects the tags, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_content_of_the_card_is_escaped(session: Session) -> None:
    evil = "</dl><script>alert(1)</script>"
    card = session_card.Card([f"nats://{evil}"], evil, None, Local(session.settings, None), problem=evil, version=evil)
    card.jetstream = card.states = evil
    page = session_card.html(card)
    shape = Shape()
    shape.feed(page)
    assert not shape.open
    assert shape.seen <= {"div", "style", "h4", "dl", "dt", "dd", "br"}
    assert page.count("&lt;script&gt;") == 6
    assert session_card.text(card).count(evil) == 6


def test_the_users_own_store_is_named(server: nqnb.DevServer) -> None:
    nq = nqnb.session(server.url, store=nqnb.MemoryStore())
    try:
        assert "MemoryStore, your own store" in as_text(nq)
    finally:
        nq.down()
