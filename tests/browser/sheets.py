"""A notebook that is open in JupyterLab or Notebook 7, with the actions of a user."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nbformat
from browser.labs import NEXT_FRAME, Lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

App = Literal["lab", "notebook"]
PATIENCE = 30_000
"""Milliseconds after which a wait fails its test."""
OF_NOTEBOOK = ("reading 'schema'", "Command 'filebrowser:open-path' not registered")
"""Errors that Notebook 7 itself writes to its console, also without nqnb in the page."""
STRAY = ("Task was destroyed", "exception was never retrieved", "was never awaited", "nats: encountered error")
"""What asyncio and the NATS client print into the current cell when a task or an error was left behind."""
OF_KERNEL = ("coro=<Kernel.dispatch", "coroutine 'Kernel.dispatch")
"""Coroutines that ipykernel itself sometimes leaves behind, also without nqnb in the kernel."""
KERNEL_DIALOGS = ("Select Kernel", "Error Starting Kernel")
"""How the dialogs begin that Jupyter shows where a kernel, or the list of kernels, comes too late."""
SHOWS_IDLE = (
    "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
    " && (document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle') ?? true)"
)
PROMPT = (
    "document.querySelectorAll('.jp-Notebook .jp-Cell')[i]?.querySelector('.jp-InputArea-prompt')?.textContent ?? ''"
)

PROMPTS = (
    "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputArea-prompt')].map(each => each.textContent)"
)


def write(path: Path, *cells: str, kernel: str = "python3") -> None:
    """Write a notebook of code cells."""
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, path)


class UnexpectedDialog(AssertionError):
    """A dialog stands in front of the notebook; its text."""


class Sheet:
    """A notebook with its own page and its own kernel.

    Args:
        browser: the browser of Playwright.
        lab: the Jupyter server.
        app: the front end.
        name: the notebook's file, in the server's folder.
        width: the width of the page in pixels.
        height: the height of the page in pixels.
        scale: device pixels per pixel, for pictures.
    """

    def __init__(
        self,
        browser: Browser,
        lab: Lab,
        app: App,
        name: str,
        *,
        width: int = 1400,
        height: int = 1000,
        scale: float = 1,
    ) -> None:
        self.lab = lab
        self.app = app
        self.name = name
        self.errors: list[str] = []
        self.strays: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # Messages of the kernel rather than outputs of cells, which another run removes.
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._look))
        self.open()

    def open(self) -> None:
        """Open the notebook, and wait for its kernel; a kernel that a slow machine did not start is tried again."""
        path = f"lab/tree/{self.name}?reset" if self.app == "lab" else f"notebooks/{self.name}"
        for attempts_left in (2, 1, 0):
            self.page.goto(f"{self.lab.url}/{path}")
            self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
            try:
                return self.idle()
            except UnexpectedDialog as error:
                if not attempts_left or not str(error).startswith(KERNEL_DIALOGS):
                    raise
        return None

    def idle(self) -> None:
        """Wait until the kernel is connected and idle."""
        self.until(self._is_idle, "the kernel is idle", 60)

    def _is_idle(self) -> bool:
        self._check_dialogs()
        # The page flashes idle before it has a kernel, and a dialog may follow. The server tells when it is connected.
        return bool(self.page.evaluate(SHOWS_IDLE)) and any(
            session["kernel"]["connections"] > 0 and session["kernel"]["execution_state"] == "idle"
            for session in self.lab.ask("GET", "sessions")
            if session["path"] == self.name
        )

    def _check_dialogs(self) -> None:
        """Fail at once where a dialog stands in front of the notebook."""
        # A dialog is attached before its header has its text.
        for header, text in self.page.evaluate(
            "[...document.querySelectorAll('.jp-Dialog')]"
            ".map(each => [each.querySelector('.jp-Dialog-header')?.innerText, each.innerText])"
        ):
            if header and text:
                raise UnexpectedDialog(text)

    def close(self) -> None:
        """Close the page; fail the test if the page had errors, or if its kernel left tasks or errors behind."""
        self.context.close()
        ours = [each for each in self.errors if self.app == "lab" or not any(known in each for known in OF_NOTEBOOK)]
        assert not ours, ours
        assert not self.strays, "\n".join(self.strays)

    def _look(self, frame: str | bytes) -> None:
        text = frame if isinstance(frame, str) else frame.decode(errors="replace")
        of_kernel = any(each in text for each in OF_KERNEL)
        if '"stderr"' in text and not of_kernel and any(each in text for each in STRAY):
            self.strays.append(text)

    def cell(self, i: int) -> Locator:
        """Return the cell at a position."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(i)

    def output(self, i: int) -> Locator:
        """Return the output of a cell."""
        return self.cell(i).locator(".jp-OutputArea").first

    def start(self, i: int) -> None:
        """Click a cell and press Shift+Enter; return once it runs or has run."""
        before = self.prompt(i)
        for _ in range(3):
            self._check_dialogs()
            with contextlib.suppress(Exception):
                self.cell(i).locator(".cm-content").click(timeout=PATIENCE / 3)
                self.page.keyboard.press("Shift+Enter")
                self.page.wait_for_function(
                    f"([i, before]) => {{ const now = {PROMPT}; return /\\[[\\d*]+\\]/.test(now) && now !== before }}",
                    arg=[i, before],
                    timeout=3000,
                )
                return
        raise AssertionError(f"cell {i} did not start")

    def run(self, i: int, timeout: float = PATIENCE) -> str:
        """Run a cell, which must succeed, and return its output."""
        self.start(i)
        return self.done(i, timeout)

    def done(self, i: int, timeout: float = PATIENCE) -> str:
        """Wait for the end of a running cell, which must succeed, and return its output."""
        self.ended(i, timeout)
        assert not self.failed(i), f"cell {i}: {self.text(i)}"
        return self.text(i)

    def ended(self, i: int, timeout: float = PATIENCE) -> None:
        """Wait until a cell has its number, whether it failed or not."""
        self.page.wait_for_function(f"i => /\\[\\d+\\]/.test({PROMPT})", arg=i, timeout=timeout)
        self.page.evaluate(NEXT_FRAME)

    def failed(self, i: int) -> bool:
        """Whether a cell shows an error."""
        said = self.cell(i).locator('[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
        return any(line.startswith(("-" * 40, "Traceback (", "nqnb: ")) for each in said for line in each.splitlines())

    def prompt(self, i: int) -> str:
        """Return the prompt of a cell, such as ``[3]:``."""
        return str(self.page.evaluate(f"i => {PROMPT}", i))

    def text(self, i: int) -> str:
        """Return the output of a cell as text."""
        return "\n".join(self.cell(i).locator(".jp-OutputArea-output").all_inner_texts()).strip()

    def table(self, i: int) -> Table:
        """Return the live table of a cell."""
        found = self.output(i).locator(".nq")
        found.wait_for()
        return Table(self, found)

    def command(self, text: str) -> None:
        """Choose a command of JupyterLab's palette by its label."""
        self.page.keyboard.press("Control+Shift+c")
        field = self.page.locator(".lm-CommandPalette-input:visible").last
        field.fill(text)
        self.page.locator(".lm-CommandPalette-item:visible").first.wait_for()
        field.press("Enter")

    def menu(self, *labels: str) -> None:
        """Choose from the menu bar."""
        self.page.locator(".lm-MenuBar-item", has_text=labels[0]).first.click()
        for label in labels[1:]:
            self.page.locator(".lm-Menu-item:visible").filter(
                has=self.page.get_by_text(label, exact=True)
            ).first.click()

    def run_all(self, *, restart: bool = False, timeout: float = PATIENCE) -> None:
        """Run > Run All Cells, or Kernel > Restart Kernel and Run All Cells…; return once every cell has its number."""
        numbered = self.page.evaluate(f"() => {PROMPTS}.some(each => /\\[\\d+\\]/.test(each))")
        if restart:
            self.menu("Kernel", "Restart Kernel and Run All Cells…")
            self.page.locator(".jp-Dialog .jp-mod-accept").click()
        else:
            self.menu("Run", "Run All Cells")
        if numbered:  # the numbers of an earlier run
            self.page.wait_for_function(f"() => {PROMPTS}.at(-1) === '[*]:'", timeout=timeout)
        try:
            self.page.wait_for_function(f"() => {PROMPTS}.every(each => /\\[\\d+\\]/.test(each))", timeout=timeout)
        except Exception as error:
            cells = range(self.page.locator(".jp-Notebook .jp-Cell").count())
            raise AssertionError("\n".join(f"{self.prompt(i)} {self.text(i)}" for i in cells)) from error

    def interrupt(self) -> None:
        """Press the stop button."""
        self.page.locator('[data-jp-item-name="interrupt"], [data-command="notebook:interrupt-kernel"]').first.click()

    def restart(self) -> None:
        """Kernel > Restart Kernel…, and confirm."""
        self.menu("Kernel", "Restart Kernel…")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.locator(".jp-Dialog").wait_for(state="detached")
        self.idle()

    def until(self, holds: Callable[[], Any], what: str = "", timeout: float = PATIENCE / 1000) -> Any:
        """Wait until a condition holds, and return its value."""
        end = time.monotonic() + timeout
        while not (found := holds()):
            assert time.monotonic() < end, f"not in time: {what or holds}"
            self.page.wait_for_timeout(30)
        return found


class Table:
    """A live table in a notebook."""

    def __init__(self, sheet: Sheet, root: Locator) -> None:
        self.sheet = sheet
        self.root = root

    @property
    def ids(self) -> list[str]:
        """The ids of the rows, in their order."""
        return list(
            self.root.evaluate("root => [...root.querySelectorAll('tbody[data-id]')].map(each => each.dataset.id)")
        )

    def row(self, id: str) -> Locator:
        """Return the rows of a task."""
        return self.root.locator(f'tbody[data-id="{id}"]')

    def button(self, id: str) -> Locator:
        """Return the cancel button of a task."""
        return self.row(id).locator("[data-act=cancel]")

    def label(self, id: str) -> str:
        """Return the status that the row of a task shows."""
        return self.row(id).locator(".nq-label").inner_text()

    def statuses(self) -> list[str]:
        """Return the statuses of the rows, in their order."""
        return list(
            self.root.evaluate("root => [...root.querySelectorAll('tbody[data-id]')].map(each => each.dataset.status)")
        )

    def count(self, status: str = "") -> int:
        """Return the count of a status; without a status, of all tasks."""
        return int(self.chip(status).locator("b").inner_text().replace(",", ""))

    def chip(self, status: str = "") -> Locator:
        """Return the button that filters by a status."""
        return self.root.locator(f'[data-act=filter][data-status="{status}"]')

    def until(self, holds: Callable[[], Any], what: str = "", timeout: float = PATIENCE / 1000) -> Any:
        """Wait until a condition holds, as `Sheet.until` does."""
        return self.sheet.until(holds, what, timeout)
