"""The model's own draft head: a second context over its NextN layers (common/speculative.cpp, ``draft-mtp``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from planner import cache, context
from planner.accounting import DeviceBytes, caches
from planner.charges import Charge
from planner.estimate import F32_BYTES, PIPELINE_COPIES, reserved_tokens
from planner.types.machine import HOST
from planner.types.usage import NOTHING, UNKNOWN_FIGURE, Figure, HostDetail, Source

if TYPE_CHECKING:
    from planner.accounting import MemoryLedger
    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types.machine import LlamaBuild, Machine
    from planner.types.plan import Placement
    from planner.types.request import PlanRequest

# Rows of the model's width that the head's graph has beyond a trunk's: the hidden states, both norms, their union.
_MORE_ROWS: Final = 5
_COPIES: Final = 2  # of each state that is kept: as computed, and on its way to the cache
_SAMPLED: Final = 4  # logits, probabilities and candidates, for tokens that are chosen on the device


def refusal(model: ModelFacts) -> str | None:
    """Return why llama.cpp would not draft with this model's head, or None (``llama_init_from_model``)."""
    return None if model.hparams.n_layer_nextn else "--spec-type draft-mtp: this model has no layers that draft"


def charge(
    model: ModelFacts,
    request: PlanRequest,
    params: ContextParams,
    placement: Placement,
    machine: Machine,
    build: LlamaBuild,
    trunk: MemoryLedger,
    n_checkpoints: int = 0,
) -> Charge:
    """Return what the head's context takes beside the trunk's, whose ledger this is.

    Its compute buffers are bounded by the trunk's: the same operations for one layer, and the same logits. The trunk's
    own grow by the states that it keeps.
    """
    own = _params(model, request, params)
    on_devices, on_host = caches(model, own, placement, machine, build)
    row = F32_BYTES * model.hparams.n_embd * reserved_tokens(own)
    states = F32_BYTES * (model.hparams.n_embd_r + model.hparams.n_embd_s)
    kept = Figure(_COPIES * states * params.n_rs_seq * params.n_seq_max, Source.ESTIMATED)
    trunks = [trunk.host.compute, *(each.compute for each in trunk.devices)]
    widest = _widest(trunks, (_MORE_ROWS + PIPELINE_COPIES) * row + (kept.bytes or 0))
    used = {*placement.layer_devices[model.hparams.n_layer :], placement.output_device}
    devices = {
        name: DeviceBytes(NOTHING, on_devices[index], widest if index in used else kept)
        for index, name in enumerate(placement.devices)
    }
    inputs = _widest([trunk.host.compute], PIPELINE_COPIES * 2 * row + (kept.bytes or 0))
    output_bytes = F32_BYTES * own.n_outputs_max * (_SAMPLED * model.hparams.n_vocab + model.hparams.n_embd_out)
    hidden_bytes = F32_BYTES * params.n_batch * model.hparams.n_embd_out  # every token's, from the trunk
    checkpoints = n_checkpoints * cache.checkpoint_bytes_beside(model, own)
    detail = HostDetail(output_buffer_bytes=output_bytes + hidden_bytes, checkpoint_bytes=checkpoints)
    return Charge("draft head", {**devices, HOST: DeviceBytes(NOTHING, on_host, inputs)}, detail)


def _params(model: ModelFacts, request: PlanRequest, trunk: ContextParams) -> ContextParams:
    """Return the parameters of the head's context (``common_base_params_to_speculative``)."""
    own = replace(
        request,
        n_ctx=trunk.n_ctx,
        n_ctx_per_slot=None,
        cache_type_k=request.cache_type_k_draft,
        cache_type_v=request.cache_type_v_draft,
        spec_type=None,
    )
    return replace(context.context_params(model, own), of_draft_head=True)


def _widest(figures: list[Figure], more_bytes: int) -> Figure:
    sizes_bytes = [figure.bytes for figure in figures if figure.bytes is not None]
    if len(sizes_bytes) < len(figures):
        return UNKNOWN_FIGURE
    return Figure(max(sizes_bytes, default=0) + more_bytes, Source.ESTIMATED)
