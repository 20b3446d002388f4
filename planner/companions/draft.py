"""The draft model: a second model with a context of its own, after the first (common/speculative.cpp)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from planner import cache, context, refusals
from planner.charges import Charge
from planner.layers import layer_devices
from planner.types.machine import HOST
from planner.types.plan import Placement

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.accounting import MemoryLedger
    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types.request import PlanRequest

    Ledgers = Callable[[ModelFacts, ContextParams, Placement], MemoryLedger]

_ALL_LAYERS: Final = -1


def refusal(draft: ModelFacts, request: PlanRequest) -> str | None:
    """Return why llama.cpp would not load this draft model, or None."""
    reason = refusals.refusal(draft, _request(request, request.n_ctx if isinstance(request.n_ctx, int) else 0))
    return None if reason is None else f"the draft model {draft.summary.path}: {reason}"


def charge(
    draft: ModelFacts,
    request: PlanRequest,
    params: ContextParams,
    placement: Placement,
    ledger_of: Ledgers,
    n_checkpoints: int = 0,
) -> Charge:
    """Return what the draft takes beside a model with these parameters on this placement.

    ``n_checkpoints`` are those of the model's contexts that have a part for the draft.
    """
    own, own_params = (
        _placement(draft, request, placement),
        context.context_params(draft, _request(request, params.n_ctx)),
    )
    ledger = ledger_of(draft, own_params, own)
    kept = n_checkpoints * cache.checkpoint_bytes_beside(draft, own_params) if cache.not_built(draft) is None else None
    return Charge(
        "draft model",
        {**dict(zip(own.devices, ledger.devices, strict=True)), HOST: ledger.host},
        replace(ledger.host_detail, prompt_cache_bytes=0, checkpoint_bytes=kept),  # the cache is the server's
        tuple(f"{reason} (draft model)" for reason in ledger.not_built),
    )


def _request(request: PlanRequest, n_ctx: int) -> PlanRequest:
    """Return the draft's knobs: its own flags, and what it shares (``common_base_params_to_speculative``)."""
    return replace(
        request,
        n_ctx=n_ctx,
        n_ctx_per_slot=None,
        n_gpu_layers=request.n_gpu_layers_draft,
        cache_type_k=request.cache_type_k_draft,
        cache_type_v=request.cache_type_v_draft,
        override_tensor=request.override_tensor_draft,
        cpu_moe=request.cpu_moe_draft,
        n_cpu_moe=request.n_cpu_moe_draft,
        n_cpu_ffn=None,
        split_mode="layer" if len(request.devices_draft or ()) == 1 else request.split_mode,
        lora=None,
        mmproj=None,
        model_draft=None,
        spec_type=None,
    )


def _placement(draft: ModelFacts, request: PlanRequest, placement: Placement) -> Placement:
    """Return where the draft's layers lie: by the model's own shares, over the devices that are named for it."""
    named = request.devices_draft
    devices = placement.devices if named is None else named
    shares = (*placement.tensor_split, *(0.0,) * len(devices))[: len(devices)]
    if not any(shares):
        shares = (1.0,) * len(devices)
    wanted = request.n_gpu_layers_draft
    n_gpu_layers = wanted if isinstance(wanted, int) else _ALL_LAYERS
    layers, output = layer_devices(draft.hparams.n_layer_all, n_gpu_layers, shares)
    return Placement(devices, layers, output, n_gpu_layers, shares)
