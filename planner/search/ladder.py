"""What gives way where a model does not fit, before it is refused: what nobody pinned and no setting decides.

The context gives way before that, and layers, experts and feed-forward matrices to the host: they are what the search
itself is about. KV cache types, slots and the context of the settings are promises to those who use the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

from planner.search.knobs import shown
from planner.types.machine import HOST
from planner.types.plan import Decision, NoFit, Plan, PlanOutcome
from planner.types.request import PlanRequest, Role

# Compute buffers shrink about as much, and prompts get slower; below this they hardly shrink any further.
SMALLEST_UBATCH: Final = 128
SMALLER_UBATCHES: Final = (256, SMALLEST_UBATCH)


class _Step(NamedTuple):
    """A knob that gives way: its field, how to call it, its new value and why."""

    dest: str
    name: str
    value: Any
    because: str


_NO_PROMPT_CACHE: Final = _Step("cache_ram_mib", "prompt cache, MiB", 0, "the host has no memory left for one")
_NO_CHECKPOINTS: Final = _Step("ctx_checkpoints", "context checkpoints", 0, "the host has no memory left for them")
_PROJECTOR_ON_HOST: Final = _Step(
    "mmproj_offload", "projector on the GPU", False, "it leaves layers no room there; images are encoded on the CPU"
)


def beside_projector(request: PlanRequest, answer: Callable[[PlanRequest], PlanOutcome]) -> PlanOutcome:
    """Return the answer with the projector on the host where layers find room on devices only so.

    Images then take longer, and every token less. Where some layers have room beside it, it stays: what more of them
    would save of each token is soon less than what an image takes on the CPU.
    """
    outcome = answer(request)
    is_open = request.mmproj is not None and request.mmproj_offload is None
    if not is_open or not isinstance(outcome, Plan) or outcome.placement.devices:
        return outcome
    without = answer(_with(request, [_PROJECTOR_ON_HOST]))
    if not isinstance(without, Plan) or not without.placement.devices:
        return outcome
    return _decided(without, [_PROJECTOR_ON_HOST])


def unburdened(request: PlanRequest, plan: Plan, answer: Callable[[PlanRequest], PlanOutcome]) -> Plan:
    """Return the plan without a prompt cache that nobody asked for, where its weights on the host then stay in memory.

    Prompts are read again then, once for each conversation that is gone on with, and not weights for each token.
    """
    headroom = plan.usages[-1].headroom_bytes or 0
    is_enough = headroom + (plan.host.prompt_cache_bytes or 0) >= 0
    if request.cache_ram_mib is not None or headroom >= 0 or not is_enough:
        return plan
    without = answer(_with(request, [_NO_PROMPT_CACHE]))
    if not isinstance(without, Plan) or (without.usages[-1].headroom_bytes or 0) < 0:
        return plan
    return _decided(without, [_NO_PROMPT_CACHE])


def relaxed(request: PlanRequest, refused: NoFit, answer: Callable[[PlanRequest], PlanOutcome]) -> Plan | None:
    """Return the plan with as few steps as need be, each a decision; None where all of them are not enough."""
    steps: dict[str, _Step] = {}
    for step in _steps(request, refused):
        steps[step.dest] = step
        for taken in ([step], [*steps.values()])[: len(steps)]:  # alone, where that is enough
            outcome = answer(_with(request, taken))
            if isinstance(outcome, Plan):
                return _decided(outcome, taken)
    return None


def _with(request: PlanRequest, steps: Iterable[_Step]) -> PlanRequest:
    return replace(request, **{step.dest: step.value for step in steps})


def _decided(plan: Plan, steps: Iterable[_Step]) -> Plan:
    decisions = tuple(Decision(step.name, shown(step.value), step.because) for step in steps)
    return replace(plan, decisions=(*plan.decisions, *decisions))


def _steps(request: PlanRequest, refused: NoFit) -> Iterator[_Step]:
    """Yield the steps in order: nobody misses a prompt cache, nor checkpoints as long as no prompt goes back.

    A smaller micro-batch takes time for each prompt, a projector on the host more of it for each image.
    """
    on_host = [cause.device == HOST for cause in refused.causes]
    if request.cache_ram_mib is None and any(on_host):
        yield _NO_PROMPT_CACHE
    if request.ctx_checkpoints is None and any(on_host) and refused.host.checkpoint_bytes:
        yield _NO_CHECKPOINTS
    if request.n_ubatch is None and request.role is Role.CHAT and not all(on_host):
        for n_ubatch in SMALLER_UBATCHES:
            if n_ubatch < (refused.request.n_ubatch or 0):
                yield _Step("n_ubatch", "micro-batch", n_ubatch, "with a larger one it does not fit")
    if request.mmproj is not None and request.mmproj_offload is None and not all(on_host):
        yield _PROJECTOR_ON_HOST
