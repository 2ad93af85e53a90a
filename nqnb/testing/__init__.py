"""Tests for users: of a `StateStore` of your own (`StoreContract`), and of nqnb itself (`chaos`).

Subclass `StoreContract` where pytest finds it, and give it a store::

    import pytest
    from nqnb.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self):
            async with MyStore("redis://127.0.0.1") as store:
                await store.clear()
                yield store

The contract needs pytest, so it is imported when it is first used. Chaos runs do not need pytest.
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
