"""The processes that run the tests of the model share what they have explored."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import room_scenarios


@pytest.fixture(autouse=True, scope="session")
def explored_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "explored"
    folder.mkdir(exist_ok=True)
    room_scenarios.shared = folder
    yield
    room_scenarios.shared = None
