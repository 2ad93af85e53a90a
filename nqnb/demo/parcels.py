"""The demo's work: parcels of files, and the handlers that hash them."""

from __future__ import annotations

import asyncio
import hashlib
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nqnb
from nqnb.worker.job import Job

PARCELS = 24
RETRIES = 2
"""How often the flaky task fails before it succeeds."""
_PACE = (0.35, 0.85)
"""Seconds that a parcel of few or of many files takes at least, so that there is something to watch."""


@dataclass
class Parcel:
    """The payload of a task: files of one package, relative to a folder."""

    name: str
    folder: str
    files: list[str]


def hash_parcel(job: Job, parcel: Parcel) -> dict[str, Any]:
    """A handler in a thread: hash the files of a parcel, at a pace that can be watched."""
    digest, size, started = hashlib.sha256(), 0, time.monotonic()
    pace = min(_PACE[0] + len(parcel.files) / 100, _PACE[1])
    for done, name in enumerate(parcel.files, 1):
        data = Path(parcel.folder, name).read_bytes()
        digest.update(data)
        size += len(data)
        job.progress(done, len(parcel.files), name)
        job.wait(max(0.0, started + pace * done / len(parcel.files) - time.monotonic()))
    return {"digest": digest.hexdigest(), "files": len(parcel.files), "bytes": size}


def hash_after_failures(job: Job, parcel: Parcel) -> dict[str, Any]:
    """A handler that fails, and fails again, before it does the same."""
    if job.attempt <= RETRIES:
        raise OSError(f"no luck in run {job.attempt}, on purpose")
    return hash_parcel(job, parcel)


async def hash_endlessly(job: Job, parcel: Parcel) -> None:
    """A coroutine as a handler: hash the files over and over, until it is cancelled."""
    turn = 0
    while True:
        turn += 1
        for done, name in enumerate(parcel.files, 1):
            data = await asyncio.to_thread(Path(parcel.folder, name).read_bytes)
            hashlib.sha256(data).hexdigest()
            job.progress(done, len(parcel.files), f"turn {turn}")
            # Without a pause it would take the time of the parcels on a small machine.
            await asyncio.sleep(0.002)


def make_parcels(count: int = PARCELS) -> list[Parcel]:
    """The source files of the standard library in that many parcels, a package each as far as there are enough."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = {
        folder.name: sorted(str(file.relative_to(root)) for file in folder.rglob("*.py"))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name not in ("site-packages", "dist-packages", "test")
    }
    # Some Pythons come without their sources, zipped or stripped; our own are always there.
    if sum(map(len, packages.values())) < count:
        root = Path(nqnb.__file__).parent
        packages = {"nqnb": sorted(str(file.relative_to(root)) for file in root.rglob("*.py"))}
    found = sorted(((name, files) for name, files in packages.items() if files), key=lambda each: len(each[1]))[-count:]
    while len(found) < count:
        name, files = found.pop()
        half = len(files) // 2
        found += [(name, files[:half]), (name, files[half:])]
        found.sort(key=lambda each: len(each[1]))
    return [Parcel(name, str(root), files) for name, files in sorted(found)]


def digest(parcel: Parcel) -> str:
    """What the handler must have found, in another way."""
    return hashlib.sha256(b"".join(Path(parcel.folder, name).read_bytes() for name in parcel.files)).hexdigest()
