"""The feed of the live tables: a failed watch is reported, and the next watch starts empty."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator

import pytest
from helpers.waiting import until

import nqnb
from nqnb.notebook.session import Session
from nqnb.records import TaskBatch


@pytest.fixture
def session(settings: nqnb.Settings) -> Iterator[Session]:
    made = nqnb.session(settings.urls[0])
    yield made
    made.down()


@pytest.mark.parametrize("error", [nqnb.Unconfirmed("a blip"), RuntimeError("nobody thought of it")])
def test_tables_show_that_the_watch_has_failed_and_a_new_watch_starts_empty(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    watch = session.client.watch
    old = session.submit("q").fetch()

    async def broken() -> AsyncGenerator[TaskBatch, None]:
        yield TaskBatch(tasks=[old], complete=True)
        raise error

    monkeypatch.setattr(session.client, "watch", broken)
    first = session.watch("q")
    until(lambda: first._state == "lost", 5)
    assert list(first.df.index) == [old.id]
    session.call(session.client.backend.states.delete(old.id, old.revision))
    new = session.submit("q")
    monkeypatch.setattr(session.client, "watch", watch)
    second = session.watch("q")
    for table in (first, second):
        until(lambda: table._state == "live", 5)  # noqa: B023  it is called at once
        assert list(table.df.index) == [new.id]
