"""What `nqnb.testing` gives to the tests of handlers and stores."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys

import pytest

import nqnb
import nqnb.testing


def resize(job: nqnb.Job, payload: dict[str, str]) -> str:
    job.progress(1, 2, "half")
    job.log("at work")
    return payload["path"]


def test_the_help_shows_the_fixtures() -> None:
    text = nqnb.testing.__doc__ or ""
    assert all(f"`{name}`" in text for name in ("nq", "nqnb_server", "nqnb_worker"))
    assert "@pytest.mark.anyio" in text


class TestJob:
    def test_a_handler_is_called_directly(self) -> None:
        job = nqnb.testing.job({"path": "a.png"}, attempt=2, max_retry=3)
        assert resize(job, {"path": "a.png"}) == "a.png"
        assert (job.payload, job.attempt, job.max_retry) == (b'{"path":"a.png"}', 2, 3)
        progress, log = job.said
        assert progress is not None
        assert (progress.done, progress.total, progress.text) == (1, 2, "half")
        assert "at work" in log[0]

    def test_a_cancelled_job_stops_the_handler(self) -> None:
        job = nqnb.testing.job(cancelled=True)
        assert job.cancelled
        with pytest.raises(nqnb.JobCancelled):
            resize(job, {"path": "a.png"})

    def test_progress_does_not_raise_in_a_cancelled_coroutine_as_in_a_worker(self) -> None:
        async def fetch(job: nqnb.Job) -> float:
            job.progress(1, 2)
            return 1.0

        job = nqnb.testing.job(cancelled=True, progress_raises=False)
        assert asyncio.run(fetch(job)) == 1.0
        assert job.cancelled
        with pytest.raises(nqnb.JobCancelled):
            job.raise_if_cancelled()
        with pytest.raises(nqnb.BadInput, match="progress_raises"):
            nqnb.testing.job(progress_raises="no")  # type: ignore[arg-type]  # that is what is tested


def test_without_pytest_the_contract_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nqnb.testing.contract", raising=False)
    monkeypatch.delitem(vars(nqnb.testing), "StoreContract", raising=False)

    def without_pytest(name: str) -> object:
        raise ModuleNotFoundError("No module named 'pytest'", name="pytest")

    monkeypatch.setattr(nqnb.testing, "import_module", without_pytest)
    with pytest.raises(ImportError, match=r"pytest is not installed\. Run `pip install pytest`"):
        _ = nqnb.testing.StoreContract


def test_every_record_that_a_client_returns_is_exported() -> None:
    returned = set()
    for kind in (nqnb.Client, nqnb.Task, nqnb.Worker):
        for name, member in vars(kind).items():
            if not name.startswith("_") and hasattr(member, "__annotations__"):
                returned |= set(re.findall(r"\w+", str(member.__annotations__.get("return"))))
    found = vars(importlib.import_module("nqnb.records")).items()
    records = {name for name, value in found if isinstance(value, type) and value.__module__.startswith("nqnb")}
    assert "TaskBatch" in returned
    assert returned & records <= set(nqnb.__all__)
