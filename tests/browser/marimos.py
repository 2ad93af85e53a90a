"""A marimo app for browser tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

from helpers.scrape import free_port

PATIENCE = 60.0
"""Seconds until the server must be up."""


def write(path: Path, *cells: str) -> None:
    """Write a marimo notebook. Cells have no arguments: each uses only the names that marimo finds in its code."""
    body = "\n\n".join(f"@app.cell\ndef _():\n{indent(dedent(cell).strip(), '    ')}\n    return" for cell in cells)
    path.write_text(f"import marimo\n\napp = marimo.App()\n\n{body}\n")


@contextlib.contextmanager
def marimo(notebook: Path, home: Path, nats_url: str) -> Iterator[str]:
    """Run a notebook as an app for a new user; return its address.

    Args:
        notebook: the file of the notebook.
        home: an empty folder, which replaces the home of the real user.
        nats_url: the address of the nats-server.
    """
    port = free_port()
    settings = home / "config" / "marimo" / "marimo.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text('[display]\ntheme = "system"\n')
    own = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "NATS_URL": nats_url}
    command = [sys.executable, "-m", "marimo", "run", str(notebook), "--headless", "--no-token", f"--port={port}"]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **own}, cwd=home, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, home / "server.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server answers."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=2)  # noqa: S310  on loopback
            return
        time.sleep(0.05)
    raise AssertionError(f"the marimo server does not start:\n{log.read_text()[-3000:]}")
