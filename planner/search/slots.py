"""How many conversations a runner has at a time, where that is left to the planner: as many as cost nothing.

Each has its own full context, as where the number is told. The plan for one is the measure: a number of slots is taken
if the plan with it is as good by docs/decisions/0006, and leaves each conversation enough context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from planner.speed import EQUAL_SPEED
from planner.text import rate
from planner.types.machine import DeviceKind
from planner.types.plan import Decision, Plan, PlanOutcome
from planner.types.request import PlanRequest, Policy

AUTO: Final = "auto"
# The most first: as many as llama-server has where nobody says (tools/server/server.cpp) and as Ollama tried while it
# chose. Each is one more search, for which somebody waits, so that 3 is not tried.
TRIED: Final = (4, 2)
# Tokens that one conversation is better off with than others beside it: the instructions and tools of an agent take ten
# thousand before it has said a word. A context beyond that is worth neither an idle runner nor another conversation.
ENOUGH_CTX: Final = 16_384


def are_open(request: PlanRequest, policy: Policy) -> bool:
    """Say whether the planner chooses the number."""
    return request.n_parallel == AUTO or (request.n_parallel is None and policy.n_parallel == AUTO)


def one_where_open(request: PlanRequest, policy: Policy) -> PlanRequest:
    """Return the request with one slot where the number is open: the measure of those with more."""
    return replace(request, n_parallel=1) if are_open(request, policy) else request


def enough_context(plan: Plan) -> int:
    """Return how many tokens are enough for a conversation with this plan's model."""
    return min(ENOUGH_CTX, plan.model.n_ctx_train or ENOUGH_CTX)


def as_many_as_cost_nothing(request: PlanRequest, one: Plan, answer: Callable[[PlanRequest], PlanOutcome]) -> Plan:
    """Return the plan with the most slots that is as good as ``one``, which has one slot, and why it has no more."""
    if not one.is_known:
        return _decided(one, "what more of them would take is not known")
    because = "each has its own context, and nothing is slower or lies elsewhere than with one"
    for count in TRIED:
        plan = _on_devices_of(one, replace(request, n_parallel=count), answer)
        cost = next(_costs(one, plan), None)
        if cost is None and isinstance(plan, Plan):
            return _decided(plan, because)
        because = f"with {count} {cost}"
    return _decided(one, because)


def _on_devices_of(one: Plan, request: PlanRequest, answer: Callable[[PlanRequest], PlanOutcome]) -> PlanOutcome:
    """Return the answer on the devices that one slot takes: a context that is open would be stretched over more."""
    order_matters = request.split_mode == "none" or request.tensor_split is not None
    if request.devices is not None or order_matters or not one.placement.devices:
        return answer(request)
    plan = answer(replace(request, devices=one.placement.devices))
    if not isinstance(plan, Plan):
        return plan
    chosen = [decision for decision in one.decisions if decision.step == "devices"]
    return replace(plan, decisions=(*chosen, *plan.decisions))


def _decided(plan: Plan, because: str) -> Plan:
    return replace(plan, decisions=(*plan.decisions, Decision("slots", str(plan.request.slots), because)))


def _costs(one: Plan, plan: PlanOutcome) -> Iterator[str]:
    """Yield what is worse with more slots than with one."""
    if not isinstance(plan, Plan) or not plan.is_known:
        yield "it does not fit"
        return
    has, wanted = plan.n_ctx_per_slot or 0, min(one.n_ctx_per_slot or 0, enough_context(one))
    if has < wanted:
        yield f"the context of each would fall to {has:,} tokens"
    fewer = any(now < before for now, before in zip(_placed(plan), _placed(one), strict=True))
    if fewer or plan.request.mmproj_offload != one.request.mmproj_offload:
        yield "less of the model would lie on the devices that one takes"
    if len(plan.placement.devices) > len(one.placement.devices):
        yield "it would take more devices"
    if plan.request.override_tensor and not one.request.override_tensor:
        yield "prompts would pass devices one after the other"  # no pipelining beside an override
    if plan.decode is not None and one.decode is not None:
        slow, fast = plan.decode.tokens_per_second, one.decode.tokens_per_second
        if slow * EQUAL_SPEED < fast:
            yield f"each would be slower: {rate(slow)} tokens a second instead of {rate(fast)}"
    left, left_by_one = (each.usages[-1].headroom_bytes for each in (plan, one))
    if (left or 0) < min(0, left_by_one or 0):
        yield "weights on the host would be pushed out of its memory"


def _placed(plan: Plan) -> tuple[int, int]:
    """Return how many layers and how many bytes of weights lie on devices."""
    on_devices = [usage for usage in plan.usages if usage.kind is not DeviceKind.HOST]
    return sum(len(usage.layers) for usage in on_devices), sum(usage.model.bytes or 0 for usage in on_devices)
