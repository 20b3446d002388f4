"""A short fit of the chaos of ``bench/chaos.py``: what must hold there, holds here."""

from __future__ import annotations

import chaos
import pytest

SECONDS = 15.0
CLIENTS = 24


@pytest.mark.llama
@pytest.mark.usefixtures("llama_tools")
def test_nothing_is_lost_doubled_or_left_behind_while_everything_is_killed(free_environment: dict[str, str]) -> None:
    """Runners are killed and stopped, workers lost, clients vanish; every request is answered once, or told why not."""
    report = chaos.run(seconds=SECONDS, clients=CLIENTS, seed=20_000)
    assert report.broken == []
    assert report.blows["runners killed"] > 0
    assert report.answers["stream done"] > 0
    assert report.answers["whole done"] > 0
