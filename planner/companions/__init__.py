"""What llama-server loads beside a model for a request, one module each: read, refused, charged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planner import adapters, cache, speculation, weights
from planner.companions import draft, draft_head, lora, projector
from planner.model import read_attachment, read_model

if TYPE_CHECKING:
    from planner.charges import Charge
    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types.machine import LlamaBuild, Machine
    from planner.types.plan import Placement
    from planner.types.request import PlanRequest


def attach(model: ModelFacts, request: PlanRequest) -> ModelFacts:
    """Return the model as this request has it loaded: with overridden metadata, and with the files beside it.

    That is the model itself where the request asks for neither. Raises ModelFileError for a file that is missing,
    unreadable or malformed, and InvalidRequest for a malformed override.
    """
    overrides = request.override_kv or ()
    if overrides:
        model = read_model(model.summary.path, overrides)
    files = adapters.files(request)
    if not (files or request.mmproj or request.model_draft):
        return model
    return replace(
        model,
        adapters=tuple(read_attachment(path) for path in files),
        projector=read_attachment(request.mmproj) if request.mmproj else None,
        draft=read_model(request.model_draft, overrides) if request.model_draft else None,
    )


def refusal(model: ModelFacts, request: PlanRequest) -> str | None:
    """Return why llama.cpp would reject what is loaded beside this model, or None."""
    reasons = [lora.refusal(model, adapter) for adapter in model.adapters]
    if model.projector is not None:
        reasons.append(projector.refusal(model.projector))
    if model.draft is not None:
        reasons.append(draft.refusal(model.draft, request))
    if speculation.uses_own_head(request) and model.draft is None:
        reasons.append(draft_head.refusal(model))
    return next((reason for reason in reasons if reason), None)


def charges(
    model: ModelFacts,
    request: PlanRequest,
    params: ContextParams,
    placement: Placement,
    machine: Machine,
    build: LlamaBuild,
    ledger_of: draft.Ledgers,
) -> tuple[Charge, ...]:
    """Return what each thing beside the model takes; of what has no rule here the model's ledger tells.

    ``ledger_of`` accounts for another model in a context of its own.
    """
    found = []
    if model.adapters and weights.not_built(model, params, placement, machine) is None:
        found.append(lora.charge(model, params, placement, machine, build))
    if model.projector is not None:
        on_host = request.mmproj_offload is False or not placement.devices
        device = machine.host if on_host else machine.device(placement.devices[0])  # common/arg.cpp
        most_tokens = projector.image_tokens(model.projector, request.passthrough)
        found.append(projector.charge(model.projector, device, build, most_tokens))
    n_checkpoints = _checkpoints(model, request, params)
    if model.draft is not None and not params.not_built:
        found.append(draft.charge(model.draft, request, params, placement, ledger_of, n_checkpoints))
    if params.loads_draft_head and not params.not_built:
        trunk = ledger_of(model, params, placement)
        found.append(draft_head.charge(model, request, params, placement, machine, build, trunk, n_checkpoints))
    return tuple(found)


def _checkpoints(model: ModelFacts, request: PlanRequest, params: ContextParams) -> int:
    """Return how many checkpoints of the model's contexts there may be that have a part for what drafts."""
    if cache.not_built(model) is not None or not (speculation.types(request) and cache.checkpoint_bytes(model, params)):
        return 0
    return params.n_ctx_checkpoints * params.n_seq_max
