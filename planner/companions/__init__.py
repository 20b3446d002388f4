"""What llama-server loads beside a model for a request, one module each: read, refused, charged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planner import weights
from planner.companions import lora, projector
from planner.model import read_attachment

if TYPE_CHECKING:
    from planner.charges import Charge
    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types import LlamaBuild, Machine, Placement, PlanRequest


def attach(model: ModelFacts, request: PlanRequest) -> ModelFacts:
    """Return the model with the files that the request loads beside it; the model itself where there are none.

    Raises ModelFileError for a file that is missing, unreadable or malformed.
    """
    if not (request.lora or request.mmproj):
        return model
    return replace(
        model,
        adapters=tuple(read_attachment(path) for path in request.lora or ()),
        projector=read_attachment(request.mmproj) if request.mmproj else None,
    )


def refusal(model: ModelFacts) -> str | None:
    """Return why llama.cpp would reject what is loaded beside this model, or None."""
    reasons = [lora.refusal(model, adapter) for adapter in model.adapters]
    if model.projector is not None:
        reasons.append(projector.refusal(model.projector))
    return next((reason for reason in reasons if reason), None)


def charges(
    model: ModelFacts,
    request: PlanRequest,
    params: ContextParams,
    placement: Placement,
    machine: Machine,
    build: LlamaBuild,
) -> tuple[Charge, ...]:
    """Return what each thing beside the model takes; of what has no rule here the model's ledger tells."""
    found = []
    if model.adapters and weights.not_built(model, params, placement, machine) is None:
        found.append(lora.charge(model, params, placement, machine, build))
    if model.projector is not None:
        on_host = request.mmproj_offload is False or not placement.devices
        device = machine.host if on_host else machine.device(placement.devices[0])  # common/arg.cpp
        found.append(projector.charge(model.projector, device, build))
    return tuple(found)
