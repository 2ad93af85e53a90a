"""The findings of axe-core, which checks the accessibility of a page."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

RUN = """async selector => {
    const options = { resultTypes: ["violations"], rules: { "target-size": { enabled: true } } };
    const { violations } = await axe.run({ include: [selector] }, options);
    return violations.filter(({ impact }) => ["serious", "critical"].includes(impact)).flatMap(({ id, nodes }) =>
        nodes.map(({ html, failureSummary }) => [id, failureSummary, html].join("\\n")));
}"""


def findings(page: Page, selector: str) -> list[str]:
    """Return the serious and critical findings in the elements that match a CSS selector."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(f"{_script()}; 0")
    return [str(each) for each in page.evaluate(RUN, selector)]


@cache
def _script() -> str:
    package = find_spec("axe_playwright_python")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8")
