"""The tests of a `StateStore`, put together."""

from __future__ import annotations

import pytest

from nqnb.testing.listing import ListingContract
from nqnb.testing.waking import WakingContract
from nqnb.testing.writing import WritingContract


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
