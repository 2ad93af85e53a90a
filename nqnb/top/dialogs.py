"""The dialogs and screens of ``nqnb top``: yes-or-no questions, the help, and one open task."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Footer, Static

from nqnb.records import LogLine
from nqnb.text import clean, clock, line

MAX_LINES = 500
"""The maximum number of lines of a log that an open task shows."""


class Question(ModalScreen[bool]):
    """A dialog that asks a yes-or-no question. Any choice other than yes means no."""

    DEFAULT_CSS = """
    Question { align: center middle; }
    Question > Vertical {
        width: 64; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface;
    }
    Question Horizontal { height: auto; align-horizontal: center; margin-top: 1; }
    Question Button { margin: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left,right", "app.focus_next", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._text = Static(Text(clean(question)))

    def ask(self, question: str) -> None:
        """Replace the question."""
        self._text.update(Text(clean(question)))

    def compose(self) -> ComposeResult:
        """Create the widgets. The "No" button has focus."""
        with Vertical():
            yield self._text
            with Horizontal():
                yield Button("No (n)", id="no", compact=True)
                yield Button("Yes (y)", id="yes", variant="warning", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Close the dialog, and return the answer of the button that was pressed."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Close the dialog, and return the answer that the key stands for."""
        self.dismiss(yes)


class QuitQuestion(Question):
    """A dialog that asks whether to quit while changes are unconfirmed. Pressing a "Quit" key again means yes."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,ctrl+c,ctrl+q", "answer(True)", "Yes", show=False)]


class Help(ModalScreen[None]):
    """The dialog that shows the keyboard shortcuts and the syntax of the filter."""

    DEFAULT_CSS = """
    Help { align: center middle; }
    Help > VerticalScroll {
        width: 78; max-width: 96%; height: auto; max-height: 96%; padding: 0 1;
        border: round $primary; background: $surface;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "dismiss", "Close", key_display="esc")
    ]

    def __init__(self, sections: Mapping[str, Iterable[tuple[str, str]]]) -> None:
        super().__init__()
        self._sections = sections

    def compose(self) -> ComposeResult:
        """Create the widgets."""
        text = Text()
        for title, pairs in self._sections.items():
            text.append(f"{title}\n", "bold")
            for key, meaning in pairs:
                text.append(f"  {key:<16}", "bold")
                text.append(f"{meaning}\n")
        text.right_crop(1)
        with VerticalScroll():
            yield Static(text)


class TaskScreen(Screen[None]):
    """One task: its state, error, traceback, attempts, payload and log. The application keeps the screen up to date."""

    DEFAULT_CSS = """
    TaskScreen > #head { height: 1; padding: 0 1; text-style: bold; }
    TaskScreen > VerticalScroll { padding: 0 1; scrollbar-size-vertical: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter", "dismiss", "Back", key_display="esc")]

    def __init__(self, task_id: str) -> None:
        super().__init__()
        self.task_id = task_id
        self.lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        """The newest lines of the task's log."""
        self.trouble = ""
        """The reason why the log cannot be read, or an empty string."""
        self._shown: object = None
        # `show` may be called before these widgets are mounted, and after they were removed.
        self._head, self._body, self._note = Static(id="head"), Static(), Static(id="note")
        self._scroll = VerticalScroll(self._body)

    def compose(self) -> ComposeResult:
        """Create the widgets."""
        yield self._head
        yield self._scroll
        yield self._note
        yield Footer()

    def show(self, head: Text, parts: list[dict[str, str]], note: Text) -> None:
        """Show a task.

        Args:
            head: the heading, which shows the id and the state of the task.
            parts: the details of the task; see `nqnb.widgets.row_content.detail`.
            note: the message to show in the line above the key bindings.
        """
        if self.lines:
            text = "\n".join(f"{clock(each.at)}  {each.text}" if each.at else each.text for each in self.lines)
            parts = [*(part for part in parts if part["kind"] != "log"), {"name": "log", "text": text}]
        if self.trouble:
            parts = [*parts, {"name": "the log cannot be read", "text": self.trouble}]
        if self._shown == (head, parts, note):
            return
        self._shown = (head, parts, note)
        scroll = self._scroll
        at_end = 0 < scroll.max_scroll_y <= scroll.scroll_offset.y
        body = Text()
        for part in parts:
            body.append(f"{line(part['name'])}\n", "bold underline")
            body.append(f"{clean(part['text'])}\n\n")
        body.rstrip()
        self._head.update(head)
        self._body.update(body)
        self._note.update(note)
        if at_end:  # the user is reading the end of the log
            scroll.scroll_end(animate=False)
