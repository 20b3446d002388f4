"""What gives way where a model does not fit, before it is refused: what nobody pinned and no setting decides.

The context gives way before that, and layers, experts and feed-forward matrices to the host: they are what the search
itself is about. KV cache types, slots and the context of the settings are promises to those who use the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

from planner.types.machine import HOST
from planner.types.plan import Decision, NoFit, Plan, PlanOutcome
from planner.types.request import PlanRequest, Role

# Compute buffers shrink about as much, and prompts get slower; below this they hardly shrink any further.
SMALLER_UBATCHES: Final = (256, 128)


class _Step(NamedTuple):
    """A knob that gives way: its field, how to call it, its new value and why."""

    dest: str
    name: str
    value: Any
    because: str


def relaxed(request: PlanRequest, refused: NoFit, answer: Callable[[PlanRequest], PlanOutcome]) -> Plan | None:
    """Return the plan with as few steps as need be, each a decision; None where all of them are not enough."""
    steps: dict[str, _Step] = {}
    for step in _steps(request, refused):
        steps[step.dest] = step
        outcome = answer(replace(request, **{dest: each.value for dest, each in steps.items()}))
        if isinstance(outcome, Plan):
            decisions = tuple(Decision(each.name, str(each.value), each.because) for each in steps.values())
            return replace(outcome, decisions=(*outcome.decisions, *decisions))
    return None


def _steps(request: PlanRequest, refused: NoFit) -> Iterator[_Step]:
    """Yield the steps in order: nobody misses a prompt cache; a smaller micro-batch takes time for each prompt."""
    on_host = [cause.device == HOST for cause in refused.causes]
    if request.cache_ram_mib is None and any(on_host):
        yield _Step("cache_ram_mib", "prompt cache, MiB", 0, "the host has no memory left for one")
    if request.n_ubatch is None and request.role is Role.CHAT and not all(on_host):
        for n_ubatch in SMALLER_UBATCHES:
            if n_ubatch < (refused.request.n_ubatch or 0):
                yield _Step("n_ubatch", "micro-batch", n_ubatch, "with a larger one it does not fit")
