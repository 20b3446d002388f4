"""Every knob gets its value: what is pinned stays, what is not is settled here and says why.

The size of the context and the place of the layers are not settled here: they are what the search is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from planner import cache, context, refusals
from planner.types.machine import Device
from planner.types.plan import Decision
from planner.types.request import FlashAttention, PlanRequest, Policy, Role
from planner.units import GIB, format_size

if TYPE_CHECKING:
    from planner.model import ModelFacts

DEFAULT: Final = "it is llama-server's default"
# What the checkpoints of all conversations may take of the host where nobody says how many there are: as much as its
# prompt cache does by default. Of some models one takes half a gigabyte, and llama-server's default is 32 of them.
MOST_CHECKPOINTS_BYTES: Final = GIB
LEAST_CHECKPOINTS: Final = 2  # as many as each prompt makes before its end (tools/server/server-context.cpp)
POOLING_LAST: Final = 3  # LLAMA_POOLING_TYPE_LAST (include/llama.h)
# A text that is embedded has to pass in one piece, and the compute buffers grow with the piece.
MAX_EMBEDDING_UBATCH: Final = 8192


class Knob(NamedTuple):
    """A value that was settled: its field in PlanRequest, how to call it, and why it is so."""

    dest: str
    name: str
    value: Any
    because: str


def settle(
    model: ModelFacts, request: PlanRequest, policy: Policy, devices: Sequence[Device]
) -> tuple[PlanRequest, tuple[Decision, ...]]:
    """Return the request with every knob set but context and placement, and a decision for each that was not pinned."""
    decisions: list[Decision] = []
    for knobs in (_by_role, _by_policy, _by_default):
        for knob in knobs(model, request, policy, devices):
            if getattr(request, knob.dest) is None:
                request = replace(request, **{knob.dest: knob.value})
                decisions.append(Decision(knob.name, shown(knob.value), knob.because))
    return request, tuple(decisions)


def with_context(request: PlanRequest, n_ctx_per_slot: int) -> PlanRequest:
    """Return the request with this context, and with the micro-batch that embedding texts of that length takes."""
    request = replace(request, n_ctx=None, n_ctx_per_slot=n_ctx_per_slot)
    if request.n_ubatch is None:
        n_ubatch = min(max(context.N_UBATCH, n_ctx_per_slot), MAX_EMBEDDING_UBATCH)
        request = replace(request, n_ubatch=n_ubatch, n_batch=request.n_batch or n_ubatch)
    return request


def needs_whole_text(model: ModelFacts, request: PlanRequest) -> bool:
    """Say whether a text must fit into one micro-batch (tools/server/server-context.cpp, ``can_split``)."""
    last = request.pooling == "last" or (request.pooling is None and model.hparams.pooling_type == POOLING_LAST)
    return request.role is not Role.CHAT and not (last and model.hparams.causal)


def _by_role(model: ModelFacts, request: PlanRequest, policy: Policy, devices: Sequence[Device]) -> Iterator[Knob]:
    del policy, devices
    if request.role is Role.EMBEDDING:
        yield Knob("embeddings", "role", True, "this is an embedding model")
    if request.role is Role.RERANK:
        yield Knob("reranking", "role", True, "this is a reranking model")
    if request.role is not Role.CHAT:
        yield Knob("cache_ram_mib", "prompt cache", 0, "nothing is continued, so no prompt is kept")
    if request.mmproj is not None:
        yield Knob("mmproj_offload", "projector on the GPU", True, DEFAULT)
    if not needs_whole_text(model, request):
        yield Knob("n_ubatch", "micro-batch", context.N_UBATCH, DEFAULT)
        yield Knob("n_batch", "batch", context.N_BATCH, DEFAULT)


def _by_policy(model: ModelFacts, request: PlanRequest, policy: Policy, devices: Sequence[Device]) -> Iterator[Knob]:
    del devices
    yield Knob("n_parallel", "slots", policy.n_parallel, "it is the setting PLANNER_NUM_PARALLEL")
    yield Knob("kv_unified", "one cache for all slots", False, "each conversation keeps the context it was promised")
    yield Knob("flash_attn", "flash attention", *_flash_attn(model, request, policy))
    cache_type = _cache_type(model, request, policy)
    why = (
        "it is the setting PLANNER_KV_CACHE_TYPE"
        if cache_type == policy.cache_type
        else f"llama.cpp refuses {policy.cache_type} here"
    )
    yield Knob("cache_type_k", "K cache", cache_type, why)
    yield Knob("cache_type_v", "V cache", cache_type, why)
    yield Knob("cache_ram_mib", "prompt cache, MiB", policy.cache_ram_mib, "it is the setting PLANNER_CACHE_RAM")


def _by_default(model: ModelFacts, request: PlanRequest, policy: Policy, devices: Sequence[Device]) -> Iterable[Knob]:
    del policy, devices
    return (
        Knob("split_mode", "split mode", "layer", DEFAULT),
        Knob("kv_offload", "caches on the GPUs", True, DEFAULT),
        Knob("op_offload", "operator offload", True, DEFAULT),
        Knob("repack", "repacked CPU weights", True, DEFAULT),
        Knob("use_host_buffer", "pinned host memory", True, DEFAULT),
        Knob("swa_full", "full-size window cache", False, DEFAULT),
        Knob("load_mode", "load mode", "auto", DEFAULT),
        Knob("lazy_mode", "lazy mode", "auto", DEFAULT),
        Knob("ctx_checkpoints", "context checkpoints", *_checkpoints(model, request)),
    )


def _flash_attn(model: ModelFacts, request: PlanRequest, policy: Policy) -> tuple[FlashAttention, str]:
    if policy.flash_attn != "auto":
        return policy.flash_attn, "it is the setting PLANNER_FLASH_ATTENTION"
    if context.context_params(model, request).flash_attn == "off":
        return "off", f"{model.hparams.architecture} does not support it"
    if model.hparams.architecture in refusals.ABORTS_WITH_FLASH_ATTENTION:
        return "off", f"llama.cpp aborts with it on {model.hparams.architecture}"
    return "auto", f"{DEFAULT}, and is on wherever each layer's device can"


def _checkpoints(model: ModelFacts, request: PlanRequest) -> tuple[int, str]:
    """Return how many checkpoints each conversation may keep on the host, and why."""
    known = cache.not_built(model) is None
    one = cache.checkpoint_bytes(model, context.context_params(model, request)) if known else 0
    most = MOST_CHECKPOINTS_BYTES // (one * request.slots) if one else context.N_CTX_CHECKPOINTS
    if most >= context.N_CTX_CHECKPOINTS or request.role is not Role.CHAT:
        return context.N_CTX_CHECKPOINTS, DEFAULT
    return max(most, LEAST_CHECKPOINTS), f"each takes {format_size(one)} of the host's memory"


def _cache_type(model: ModelFacts, request: PlanRequest, policy: Policy) -> str:
    """Return the operator's cache type, or f16 where llama.cpp would refuse it for this model or these flags."""
    if policy.cache_type == "f16":
        return "f16"
    wanted = replace(
        request,
        cache_type_k=request.cache_type_k or policy.cache_type,
        cache_type_v=request.cache_type_v or policy.cache_type,
    )
    return policy.cache_type if refusals.refusal(model, wanted) is None else "f16"


def shown(value: Any) -> str:
    """Return a knob's value as a decision says it."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
