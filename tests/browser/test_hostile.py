"""Hostile content of a queue stays text: none of it runs in the page, and the table keeps its layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats
import pytest
from browser.bucket import Bucket
from browser.sheets import Sheet

import nqnb
from nqnb.protocol.wire import ErrorInfo, Meta, Progress, Status, TaskMessage

EVIL = (
    "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>\"'`&amp;</td></table>"
    "<style>*{display:none}</style>"
)
RIGHT_TO_LEFT = (
    "\u202e\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd\u2066 "
    "\U0001f9d1\u200d\U0001f680\U0001f1fa\U0001f1f3 z\u0335\u0310\u0361alg\u0323o"
)
LONG = "w" * 600_000
TEXTS = {"evil": EVIL, "rtl": RIGHT_TO_LEFT, "long": LONG, "lines": "a\r\n\x1b[31mred\x00\x07" * 2000}


def messages() -> dict[str, TaskMessage]:
    """Return hostile entries of the bucket, by key."""
    made = {}
    now = time.time()
    for name, text in TEXTS.items():
        short = text[:100_000]
        for status in (Status.PENDING, Status.PROCESSING, Status.FAILED):
            meta = Meta(
                client=short[:300], submitted_at=now - 90, worker=short[:300], started_at=now - 50,
                progress=Progress(3, 10, short[:1000]), log=[short[:2000]] * 3,
                error=ErrorInfo(short[:200], short, short),
            )  # fmt: skip
            if status is Status.FAILED:
                meta.finished_at = now - 10
            made[f"{name}-{status.label}"] = TaskMessage(
                ID=f"{name}-{status.label}", Queue="resize", Status=status, Payload=text.encode(), Meta=meta
            )
    # An id, a queue and a status that nqnb never writes.
    made["odd"] = TaskMessage(ID=EVIL, Queue=EVIL, Payload=EVIL.encode())
    return made


async def put(url: str, entries: dict[str, bytes]) -> None:
    """Write entries into the bucket without nqnb."""
    stranger = await nats.connect(url)
    for key, value in entries.items():
        await stranger.jetstream().publish(f"$KV.nq-store.{key}", value)
    await stranger.close()


@pytest.mark.full
def test_no_content_of_a_queue_becomes_markup(
    server: nqnb.DevServer, sheet: Callable[..., Sheet], look: Bucket, shot: Callable[[Any, str], Path]
) -> None:
    page = sheet(
        "lab",
        "import nqnb\nnq = nqnb.session()",
        "table = nq.watch()\ntable",
        "nq.tasks()",
        "table.freeze()",
        "nq.task('evil-failed')",
        height=2000,
    )
    page.run(0)
    page.run(1)
    entries = {key: message.encode() for key, message in messages().items()}
    entries["junk"] = b"<script>window.pwned=3</script>"
    entries["<script>window"] = TaskMessage(ID="<script>window", Queue="resize", Payload=EVIL.encode()).encode()
    look.call(put, server.url, entries)
    page.run(2)
    table = page.table(2)
    rows = len(look.call(look.client.tasks))
    assert rows >= 12
    table.until(lambda: len(table.ids) == rows, "all tasks")
    for each in ("evil-failed", "rtl-failed", "long-failed", "lines-failed", "evil-processing"):
        table.row(each).locator("[data-act=open]").click()
        table.row(each).locator(".nq-more pre").first.wait_for()
    shot(table.root, "hostile")
    assert "<script>window.pwned=1</script>" in table.row("evil-failed").locator(".nq-error").inner_text()
    shape = table.root.evaluate(
        """root => ({
            heights: [...root.querySelectorAll('.nq-row')].map(row => row.offsetHeight),
            opened: [...root.querySelectorAll('.nq-more')].map(row => row.offsetHeight),
            wider: [...root.querySelectorAll('.nq-row, .nq-more, header, footer')]
                .filter(each => each.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).length,
            foreign: root.querySelectorAll('script, img, style:not(.nq-hider), iframe, a, svg, object').length,
        })"""
    )
    print(shape)
    assert max(shape["heights"]) - min(shape["heights"]) <= 2, "every row is one line high"
    assert max(shape["opened"]) < 2500, "an opened row ends somewhere"
    assert shape["wider"] == 0
    assert shape["foreign"] == 0
    # The table still works: the search and a button.
    table.root.get_by_role("searchbox").fill("<script>")
    table.until(lambda: 0 < len(table.ids) < rows, "the search finds some")
    table.root.get_by_role("searchbox").fill("")
    table.until(lambda: len(table.ids) == rows, "all are back")
    table.button("evil-pending").click()
    status, _ = look.ended("evil-pending")
    assert status is Status.DELETED
    # The DataFrame, the snapshot, the line of a task.
    page.run(3)
    page.run(4)
    page.run(5)
    still = page.output(2)
    still.locator(".nq").wait_for(state="detached")
    still.locator("table").wait_for()
    shot(still, "hostile-frozen")
    assert "<script>" in still.inner_text()
    for i in (2, 3, 5):
        assert page.output(i).locator("script, img, iframe, object").count() == 0
    assert page.page.evaluate("window.pwned") is None, "nothing ran"
