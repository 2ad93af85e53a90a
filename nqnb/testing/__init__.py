"""Tests for a `StateStore` of your own: subclass `StoreContract` where pytest finds it, and give it a store.

::

    import pytest
    from nqnb.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            async with MyStore("redis://127.0.0.1") as store:
                await store.clear()
                yield store

This room is for tests alone: it needs pytest, and nothing else of nqnb imports it.
"""

from __future__ import annotations

import pytest

from nqnb.testing.listing import ListingContract
from nqnb.testing.waking import WakingContract
from nqnb.testing.writing import WritingContract

__all__ = ["StoreContract"]


class StoreContract(WritingContract, ListingContract, WakingContract):
    """What every `StateStore` must do, as pytest tests; what fails says what the store did.

    A subclass, named ``Test…``, has a fixture ``store`` that gives each test an empty store of its own; it may be
    async. The tests run on asyncio by anyio's pytest plugin, which comes with nqnb. ``patience`` can be set.
    """

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The loop that the tests run on: nqnb's is asyncio."""
        return "asyncio"
