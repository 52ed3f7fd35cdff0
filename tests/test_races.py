"""Planted races of two streams: the fake device sees them, or a verified call does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

from support.races import RACES, Race, seen_by_device, seen_by_verify

DOCUMENT = Path(__file__).parents[1] / "docs" / "faults.md"


@pytest.mark.parametrize("race", RACES, ids=lambda race: race.name)
def test_who_sees_a_race(race: Race):
    assert race.device or race.verify
    assert seen_by_device(race, race.program) == race.device
    assert seen_by_verify(race, race.program) == race.verify


@pytest.mark.parametrize("program", dict.fromkeys(race.program for race in RACES))
def test_without_a_race_nothing_is_seen(program):
    assert not seen_by_device(None, program)
    assert not seen_by_verify(None, program)
