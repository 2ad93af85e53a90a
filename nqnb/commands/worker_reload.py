"""The parent process of ``nqnb worker --reload``, which restarts the worker when a Python file changes."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import click

from nqnb.commands.worker_processes import WorkerProcess, exit_code, forwarded_signals
from nqnb.error_text import clause
from nqnb.errors import NqnbError

log = logging.getLogger("nqnb.worker")


class Reloader:
    """A worker process that is restarted when a Python file in one of the folders changes.

    Before a restart, the worker stops in the same way as after SIGTERM: it waits for running tasks, and unfinished
    tasks are redelivered. If the process fails, for example because of a syntax error, the parent waits for the next
    change.

    Args:
        arguments: the arguments after ``nqnb worker`` on the command line of the process.
        options: the fields of `nqnb.Settings` for the process.
        folders: the folders to watch, including all of their subfolders.

    Raises:
        UsageError: watchfiles is not installed.
    """

    def __init__(self, arguments: Sequence[str], options: dict[str, Any], folders: Sequence[str]) -> None:
        try:
            self._watchfiles: Any = importlib.import_module("watchfiles")
        except ImportError as error:
            raise click.UsageError(
                f"--reload is not available: watchfiles cannot be imported ({clause(error)}). "
                "Install it with: pip install 'nqnb[reload]'"
            ) from None
        self._arguments = arguments
        self._options = options
        self._folders = folders
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._process: WorkerProcess | None = None

    async def run(self) -> int:
        """Run the worker until a signal is received, or its process exits with code 0.

        Returns:
            The exit code of the last process.

        Raises:
            NqnbError: the folders cannot be watched.
        """
        watching = asyncio.ensure_future(self._watch())
        log.info("watching the Python files in %s", ", ".join(self._folders))
        try:
            with forwarded_signals(self._forward):
                while True:
                    self._changed.clear()
                    process = self._process = WorkerProcess(self._arguments, self._options)
                    await self._ended(process, watching)
                    if self._stop.is_set():
                        return max(0, process.code)  # the signal may have killed a process that was still starting
                    if self._changed.is_set():
                        continue
                    if process.code == 0:
                        return 0
                    log.error("%s; waiting for a Python file to change", process.end_text())
                    await self._first(watching, self._changed.wait(), self._stop.wait())
                    if self._stop.is_set():
                        return exit_code(process.code)
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            if self._process is not None:
                self._process.signal(signal.SIGKILL)

    async def _ended(self, process: WorkerProcess, watching: asyncio.Future[None]) -> None:
        """Wait until the process has exited. If a file changes, ask the process to stop."""

        async def end() -> None:
            await process.serves()
            await process.ended()

        ended = asyncio.ensure_future(end())
        try:
            await self._first(watching, asyncio.shield(ended), self._changed.wait())
            if not ended.done():
                process.leave()
            await ended
        finally:
            ended.cancel()

    @staticmethod
    async def _first(watching: asyncio.Future[None], *awaitables: Awaitable[object]) -> None:
        """Wait until one of the awaitables is done.

        Raises:
            NqnbError: the folders cannot be watched.
        """
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in awaitables]
        try:
            await asyncio.wait({watching, *waits}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        if watching.done():
            watching.result()

    async def _watch(self) -> None:
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # watchfiles logs every change
        python = self._watchfiles.PythonFilter()
        try:
            async for changes in self._watchfiles.awatch(*self._folders, watch_filter=python):
                log.info("%s changed; restarting the worker", _files_text({path for _, path in changes}))
                self._changed.set()
        except (OSError, RuntimeError) as error:
            raise NqnbError(
                f"changes in {', '.join(self._folders)} cannot be watched: {clause(error)}. "
                "Start the worker without --reload, or reduce the number of files in the watched folders."
            ) from error

    def _forward(self, number: signal.Signals) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self._stop.set()
        if self._process is not None:
            self._process.signal(number)


def _files_text(paths: set[str]) -> str:
    first, *others = sorted(map(os.path.relpath, paths))
    return first if not others else f"{first} and {len(others)} more"


def watched_folders(module: str) -> list[str]:
    """Return the folders of the package that contains a module, or the folder of a module without a package.

    The module is not imported, because it may contain an error that the user is about to correct.

    Raises:
        UsageError: the module was not found.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) if top.isidentifier() else None
    except ValueError:
        spec = None  # the module is loaded, but has no spec, such as __main__
    if spec is None:
        raise click.UsageError(
            f"module {top!r} cannot be watched: it is not in {os.getcwd()!r}, and is not installed. "
            f"Change to the folder that contains {top!r}, or install the module"
        )
    if spec.submodule_search_locations:
        return list(spec.submodule_search_locations)
    return [str(Path(spec.origin).parent) if spec.has_location and spec.origin else os.getcwd()]
