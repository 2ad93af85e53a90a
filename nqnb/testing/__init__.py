"""Test tools: `job` for handlers, `StoreContract` for a custom `StateStore`, and `chaos` for nqnb itself.

Subclass `StoreContract` in a test module, and define the fixture ``store``::

    import pytest
    from nqnb.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            async with MyStore("redis://127.0.0.1") as store:
                await store.clear()
                yield store

`StoreContract` needs pytest, so it is imported when it is first used. Chaos runs do not need pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nqnb import payload as payloads
from nqnb.worker.job import Job

if TYPE_CHECKING:
    from nqnb.testing.contract import StoreContract

__all__ = ["StoreContract", "job"]


def job(
    payload: Any = None,
    *,
    id: str = "test",
    queue: str = "test",
    attempt: int = 1,
    max_retry: int = 0,
    cancelled: bool = False,
) -> Job:
    """Return a `Job` for calling a handler without a server, as in ``resize(job(data), data)``.

    `Job.said` returns the last progress and the log.

    Args:
        payload: the payload of the task: bytes, or a value that is encoded as JSON.
        id: the task id.
        queue: the queue.
        attempt: the number of the attempt, starting at 1.
        max_retry: the maximum number of retries.
        cancelled: whether the handler must stop. Then `Job.progress` and `Job.raise_if_cancelled` raise.

    Raises:
        UnencodableValue: the payload cannot be encoded.
    """
    made = Job(id, queue, payloads.encode(payload), attempt, max_retry, None, lambda: None, progress_raises=True)
    if cancelled:
        made.state.stop.set()
    return made


def __getattr__(name: str) -> Any:
    if name == "StoreContract":
        try:
            value = getattr(import_module("nqnb.testing.contract"), name)
        except ModuleNotFoundError as error:
            if error.name != "pytest":
                raise
            raise ImportError(
                "nqnb.testing.StoreContract cannot be imported: pytest is not installed. Run `pip install pytest`."
            ) from None
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nqnb.testing' has no attribute {name!r}")
