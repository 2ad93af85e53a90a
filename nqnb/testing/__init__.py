"""Tests for users: for your own `StateStore` (`StoreContract`), and for nqnb itself (`chaos`).

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

if TYPE_CHECKING:
    from nqnb.testing.contract import StoreContract

__all__ = ["StoreContract"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module("nqnb.testing.contract"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nqnb.testing' has no attribute {name!r}")
