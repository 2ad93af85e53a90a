"""A Jupyter server for a new user, with JupyterLab and Notebook 7, and a Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--font-render-hinting=none",
]
NEXT_FRAME = "() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
"""Waits until the page has drawn what it has received."""
PATIENCE = 60.0
"""Seconds until the server must be up."""
SETTINGS = {
    # No news and no search for updates: nothing here contacts the internet.
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
    # An automatic save would race with the tests.
    "@jupyterlab/docmanager-extension/plugin.jupyterlab-settings": {"autosave": False},
    # Completions that come after this time are ignored; default one second.
    "@jupyterlab/completer-extension/manager.jupyterlab-settings": {"providerTimeout": 30_000},
}


def chromium_path() -> str | None:
    """Return the path of Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run a headless Chromium. While it runs, this thread has a running event loop: that of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Lab:
    """A running Jupyter server.

    Attributes:
        url: its address, on loopback; it needs no token.
        root: the folder of its notebooks.
        home: the home folder of its user.
    """

    url: str
    root: Path
    home: Path

    def ask(self, method: str, path: str) -> Any:
        """Send a request to its API."""
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method)  # noqa: S310  on loopback
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310  the same
            body = answer.read()
        return json.loads(body) if body else None

    def end_kernels(self) -> None:
        """Shut down every kernel."""
        for session in self.ask("GET", "sessions"):
            self.ask("DELETE", f"sessions/{session['id']}")

    @property
    def log(self) -> str:
        """The log of the server."""
        return (self.home / "server.log").read_text(errors="replace")


@contextlib.contextmanager
def jupyter(
    root: Path,
    home: Path,
    python: str = sys.executable,
    environ: Mapping[str, str] | None = None,
    module: str = "jupyterlab",
) -> Iterator[Lab]:
    """Run a Jupyter server.

    Args:
        root: the folder of its notebooks.
        home: an empty folder, which replaces the home of the real user.
        python: the Python that has JupyterLab and Notebook.
        environ: more environment variables.
        module: the front end's module, which starts the server.
    """
    for name, content in SETTINGS.items():
        path = home / "settings" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    own = {
        name: str(home / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CONFIG_HOME",
                     "XDG_DATA_HOME", "XDG_CACHE_HOME", "JUPYTERLAB_WORKSPACES_DIR")
    }  # fmt: skip
    own |= {"HOME": str(home), "LOGNAME": "ada", "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "JUPYTER", "JPY_"))}
    command = [
        python, "-m", module, "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
        "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True",
        f"--ServerApp.root_dir={root}",
        "--ServerApp.terminals_enabled=False", "--MappingKernelManager.cull_idle_timeout=0",
    ]  # fmt: skip
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**kept, **own, **(environ or {})}, cwd=root, start_new_session=True
        )
    try:
        yield Lab(_address(process, Path(own["JUPYTER_RUNTIME_DIR"]), home), root, home)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], runtime: Path, home: Path) -> str:
    """Return the address from the server's runtime file, once the server answers."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            found = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
            url = f"http://127.0.0.1:{found['port']}"
            urllib.request.urlopen(f"{url}/api/status", timeout=2)  # noqa: S310  on loopback
            return url
        time.sleep(0.05)
    raise AssertionError(f"the Jupyter server does not start:\n{(home / 'server.log').read_text()[-3000:]}")
