"""Tools for testing handlers (`job`), failovers (`Cluster`), custom state stores (`StoreContract`) and nqnb (`chaos`).

To test a custom `StateStore`, subclass `StoreContract` in a test module and define a fixture named ``store``::

    import pytest
    from nqnb.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            async with MyStore("redis://127.0.0.1") as store:
                await store.clear()
                yield store

If pytest and nqnb are installed, pytest finds three fixtures: `nqnb_server` is a real nats-server with an empty store,
`nq` is a client, and `nqnb_worker` is a worker without handlers. An async test needs a marker, such as anyio's::

    @pytest.mark.anyio
    async def test_double(nq, nqnb_worker):
        @nqnb_worker.handler("double")
        def double(job, payload):
            return 2 * payload

        task = await nq.submit("double", 21)
        await nqnb_worker.run_until_idle()
        assert await task == 42

Only `StoreContract` and the fixtures require pytest. `StoreContract` and the package `nqnb.testing.chaos` are imported
on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nqnb import payload as payloads
from nqnb.inputs import check_flag
from nqnb.server.cluster import Cluster
from nqnb.worker.job import Job

if TYPE_CHECKING:
    from nqnb.testing.contract import StoreContract

__all__ = ["Cluster", "StoreContract", "job"]


def job(
    payload: Any = None,
    *,
    id: str = "test",
    queue: str = "test",
    attempt: int = 1,
    max_retry: int = 0,
    cancelled: bool = False,
    progress_raises: bool = True,
) -> Job:
    """Return a `Job` for calling a handler without a server, for example ``resize(job(data), data)``.

    After the handler has run, `Job.said` contains the last progress and the log lines that the handler reported.

    Args:
        payload: the task's payload, as bytes or as a value to encode as JSON.
        id: the task id.
        queue: the queue name.
        attempt: the attempt number, starting at 1.
        max_retry: the maximum number of retries.
        cancelled: whether the handler must stop. If so, `Job.wait` and `Job.raise_if_cancelled` raise `JobCancelled`.
        progress_raises: whether `Job.progress` also raises `JobCancelled` if the handler must stop. Pass False if your
            worker is created with ``progress_raises=False``. Also pass False for an ``async def`` handler, because a
            worker stops such a handler at an ``await``.

    Raises:
        UnencodableValue: the payload cannot be encoded as JSON.
        BadInput: ``progress_raises`` is not a bool.
    """
    made = Job(
        id,
        queue,
        payloads.encode(payload),
        attempt,
        max_retry,
        None,
        lambda: None,
        progress_raises=check_flag("progress_raises", progress_raises),
    )
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
    if name == "chaos":
        return import_module("nqnb.testing.chaos")
    raise AttributeError(f"module 'nqnb.testing' has no attribute {name!r}")
