"""A live table in a real browser, connected to a real `TaskTable` without a notebook."""

from __future__ import annotations

import base64
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from browser.labs import NEXT_FRAME

import nqnb
from nqnb.protocol.wire import Meta, Status, TaskMessage
from nqnb.records import TaskBatch, TaskInfo
from nqnb.widgets.rows import Rows
from nqnb.widgets.table import TaskTable

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Route

SITE = "http://localhost:9/"
"""No server listens there: the test answers every request. A page of this origin may use the clipboard."""
FILES = {
    "": Path(__file__).parent / "harness.html",
    **{
        name: Path(nqnb.__file__).parent / "widgets" / "static" / name
        for name in ("table.js", "table.css", "board.js", "board.css")
    },
}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def task(task_id: str, status: Status = Status.PENDING, revision: int = 1, **fields: Any) -> TaskInfo:
    """Return a task; fields that are not of the message itself are fields of its ``Meta``."""
    own = {name: fields.pop(name) for name in ("Payload", "CurrentRetry", "MaxRetry") if name in fields}
    now = time.time()
    fields.setdefault("submitted_at", now - 100)
    if status is not Status.PENDING:
        fields = {"started_at": now - 40, "worker": "gpu-3/811", **fields}
    if status.terminal:
        fields.setdefault("finished_at", now - 10)
    message = TaskMessage(ID=task_id, Queue="resize", Status=status, Meta=Meta(**fields), **{"Payload": b"{}", **own})
    return TaskInfo.of(message, revision)


class Bench:
    """A page with a table.

    Args:
        browser: the browser of Playwright.
        width: the width of the page in pixels; the table is 40 pixels narrower.
        dark: whether the system prefers dark pages.
        rows: the rows of the table.
        shadow: whether the table is in a shadow root, as in marimo.
        deaf: whether messages of the page are kept back from the start; see `deaf`.
    """

    def __init__(
        self,
        browser: Browser,
        *,
        width: int = 1200,
        dark: bool = False,
        rows: Rows | None = None,
        shadow: bool = False,
        deaf: bool = False,
    ) -> None:
        self.cancelled: list[list[str]] = []
        self.requeued: list[list[str]] = []
        self.heard: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.deaf = deaf
        """Whether messages of the page are kept back, as by a busy kernel."""
        self._kept: list[dict[str, Any]] = []
        self._pushes: deque[tuple[dict[str, Any], list[bytes]]] = deque()
        self.table = TaskTable(
            Rows() if rows is None else rows,
            title="resize",
            cancel=self.cancelled.append,
            requeue=self.requeued.append,
        )
        self.table.send = lambda content, buffers=None: self._pushes.append((content, buffers or []))
        scheme: Any = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=SITE)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.route("**/*", self._serve)
        self.page.expose_function("toKernel", self._hear)
        self.page.goto(f"{SITE}#shadow" if shadow else SITE)
        self.until(lambda: self.page.evaluate("window.ready"))
        # The kernel sends rows only to a page from which it has received a message.
        self.until(lambda: self.heard or self._kept)

    def close(self) -> None:
        self.table.close()
        self.context.close()
        assert not self.errors, self.errors

    def feed(self, *tasks: TaskInfo, **fields: Any) -> None:
        """Send the table a batch, and wait until the page has received it."""
        self.table.update(TaskBatch(tasks=list(tasks), **{"complete": True, **fields}))
        self.settle()

    def settle(self, seconds: float = 0.25) -> None:
        """Exchange messages for some time, and ten times at least: a busy machine needs more time for an exchange."""
        end, exchanges = time.monotonic() + seconds, 0
        while time.monotonic() < end or exchanges < 10:
            self._pump()
            self.page.evaluate(NEXT_FRAME)
            exchanges += 1

    def until(self, true: Callable[[], Any], seconds: float = 30) -> None:
        """Exchange messages until a condition holds."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "the condition did not hold in time"
            self._pump()

    def listen(self) -> None:
        """Deliver the messages that were kept back."""
        self.deaf = False
        for message in self._kept:
            self._hear(message)
        self._kept.clear()

    def row(self, task_id: str) -> Locator:
        return self.page.locator(f'tbody[data-id="{task_id}"]')

    def button(self, task_id: str) -> Locator:
        return self.row(task_id).locator("[data-act=cancel]")

    @property
    def ids(self) -> list[str]:
        """The ids of the rows, in their order."""
        return [
            str(each) for each in self.page.eval_on_selector_all("tbody", "rows => rows.map(row => row.dataset.id)")
        ]

    @property
    def focused(self) -> str:
        """The row and the class of the element with the focus."""
        found = "e => [e.closest('tbody')?.dataset.id ?? '', e.className].join(' ')"
        return str(self.page.evaluate(f"({found})(document.activeElement)"))

    def _pump(self) -> None:
        while self._pushes:
            message, buffers = self._pushes.popleft()
            texts = [base64.b64encode(each).decode() for each in buffers]
            self.page.evaluate("([message, buffers]) => window.fire('msg:custom', message, buffers)", [message, texts])
        self.page.wait_for_timeout(10)

    def _hear(self, message: dict[str, Any]) -> None:
        if self.deaf:
            self._kept.append(message)
        else:
            self.heard.append(message)
            self.table._receive(message)

    def _serve(self, route: Route) -> None:
        file = FILES.get(route.request.url.removeprefix(SITE))
        if file is None:
            route.fulfill(status=204)
        else:
            route.fulfill(body=file.read_text(encoding="utf-8"), content_type=KINDS[file.suffix])
