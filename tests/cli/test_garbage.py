"""A command collects garbage less often than the program that runs it."""

from __future__ import annotations

import gc

import pytest

from nqnb import cli
from nqnb.cli import main
from nqnb.garbage import THRESHOLD, rare_collections


def test_a_command_collects_garbage_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = gc.get_threshold(), []

    def note(*_: object) -> int:
        during.append(gc.get_threshold())
        return 0

    monkeypatch.setattr(cli, "_run", note)
    assert main([]) == 0
    assert [threshold[0] for threshold in during] == [THRESHOLD]
    assert gc.get_threshold() == before


def test_disabled_or_rarer_collections_stay_as_they_are() -> None:
    before = gc.get_threshold()
    try:
        for threshold in (0, 2 * THRESHOLD):
            gc.set_threshold(threshold)
            with rare_collections():
                assert gc.get_threshold()[0] == threshold
            assert gc.get_threshold()[0] == threshold
    finally:
        gc.set_threshold(*before)
