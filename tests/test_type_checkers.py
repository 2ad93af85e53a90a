"""mypy and pyright accept correct uses of the public types, and report each wrong use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parent / "typing_samples"
SAMPLE = SAMPLES / "typed_tasks.py"
CHECKERS = {
    "mypy": ["--strict", "--output", "json", "--no-error-summary", "--cache-dir", os.devnull],
    "pyright": ["--outputjson", "--pythonpath", sys.executable],
}

pytestmark = pytest.mark.full


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_reports_each_wrong_use_and_nothing_else(checker: str, tmp_path: Path) -> None:
    if find_spec(checker) is None and os.environ.get("CI") == "true":
        pytest.fail(f"{checker} is not installed", pytrace=False)
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    command = [sys.executable, "-m", checker, *CHECKERS[checker], str(SAMPLE)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "  # wrong: " in line}
    found = errors(checker, ran.stdout)
    assert {number for number, _ in found} == wrong, "\n".join(f"{at}: {text}" for at, text in found) + ran.stderr


def errors(checker: str, output: str) -> list[tuple[int, str]]:
    """Return the line and the text of each error that a checker printed as JSON."""
    if checker == "mypy":
        each = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return [(error["line"], error["message"]) for error in each if error["severity"] == "error"]
    diagnostics = json.loads(output)["generalDiagnostics"]
    return [
        (each["range"]["start"]["line"] + 1, each["message"]) for each in diagnostics if each["severity"] == "error"
    ]
