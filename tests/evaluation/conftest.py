from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def point(monkeypatch):
    """Register the simulator of `point.py`, here and for the processes that are started."""
    pytest.importorskip("gymnasium")
    from hf_vla.evaluation.envs.registry import ENVS

    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setitem(ENVS, "point", "point.PointTask")
    import point

    return point


@pytest.fixture(scope="session")
def results():
    """What must be the same of records whatever the timing: all but times and restarts, in one order."""

    def strip(records):
        alike = [replace(each, latency_ms=[], wall_s=0.0, restarts=0) for each in records]
        return sorted(alike, key=lambda each: (each.probe, each.task, each.seed))

    return strip
