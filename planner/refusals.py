"""What llama.cpp rejects of a model and its flags, and over what it would end itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner import adapters, context, ggml, weights
from planner.architectures import ARCHITECTURES, Cache
from planner.flag_values import MAX_DEVICES
from planner.types.machine import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.context import ContextParams
    from planner.model import ModelFacts
    from planner.types.request import PlanRequest

# Architectures that end llama.cpp by GGML_ASSERT(ggml_can_repeat(b, a)) where sequences get unequal parts of a batch.
_EVEN_SLOTS: Final = frozenset({"kimi-linear"})

# The same where sequences are no single stream: the bias of T5's positions is that of one.
_ONE_STREAM: Final = frozenset({"t5encoder"})

# Whose embeddings are read for all residual streams, where the graph puts out one (hparams.n_embd_out_impl).
_READ_WIDER: Final = frozenset({"deepseek4", "qwen4exp"})

_TRIED_TOKENS: Final = 2  # common/common.cpp, common_context_can_seq_rm: decoded at once to see what the cache can do

ABORTS_WITH_FLASH_ATTENTION: Final = frozenset({"plm"})
"""Architectures whose V llama.cpp cannot store untransposed: GGML_ASSERT(a->ne[0] == b->ne[0]) in ggml_set_rows."""


def refusal(model: ModelFacts, request: PlanRequest, kinds: Sequence[DeviceKind] = ()) -> str | None:
    """Return why llama.cpp would reject this model or these flags, or None; of several reasons the one it gives.

    ``kinds`` are those of the devices to be used. (src/llama-context.cpp, ``llama_init_from_model``;
    src/llama-model.cpp, ``make_gpu_buft_list``; common/arg.cpp.)
    """
    return _model_refusal(model) or _split_refusal(model, request, kinds) or _cache_refusal(model, request)


def aborts(model: ModelFacts, params: ContextParams) -> str | None:
    """Return why llama-server would end itself by an assertion while it loads, or None; it does not refuse these."""
    facts, n_slots = model.hparams, params.n_seq_max
    wider_batch = "--ubatch-size" if params.embeddings else "--batch-size"
    n_tokens = min(params.n_ctx, params.n_ubatch)
    if facts.n_expert_used > facts.n_expert or (facts.n_expert and not facts.n_expert_used):
        reason = f"of its {facts.n_expert} experts {facts.n_expert_used} are used"  # src/llama-model.cpp, load_hparams
    elif params.n_outputs_max < n_slots:  # src/llama-context.cpp, output_reserve
        reason = (
            f"a batch of {params.n_outputs_max} has no output for each of {n_slots} slots: give {wider_batch} {n_slots}"
        )
    elif params.n_batch < _TRIED_TOKENS and not params.n_rs_seq and _has_cache(model):
        # Where attention is causal a batch is no longer than the context.
        flag = "--ctx-size" if params.n_ctx_unpadded < _TRIED_TOKENS else wider_batch
        reason = f"a batch of {params.n_batch} does not take the {_TRIED_TOKENS} tokens of its trial: give {flag} 2"
    elif facts.architecture in _READ_WIDER and params.embeddings and context.pooling(facts, params) != "rank":
        reason = f"the embeddings of {facts.architecture} are read beyond their end: go without --embeddings"
    elif facts.architecture == "t5":  # its trial is decoded, and nothing was encoded before
        reason = "llama-server does not encode before it decodes, as t5 has to"
    elif params.applies_adapters and _adapts_output(model):
        reason = "an adapter changes the embedding, which is the output too: go without it"
    elif facts.architecture in ABORTS_WITH_FLASH_ATTENTION and params.flash_attn != "off" and n_tokens > 1:
        reason = f"flash attention does not work with {facts.architecture}: give --flash-attn off"
    elif facts.architecture in _ONE_STREAM and params.n_stream > 1:
        reason = f"{facts.architecture} takes one stream only: give --kv-unified"
    elif n_tokens % n_slots and _takes_even_slots_only(model, params):
        reason = f"{n_slots} slots do not share a micro-batch of {n_tokens} evenly: give {_even(n_tokens, n_slots)}"
    else:
        return None
    return f"llama.cpp aborts while it loads this model, since {reason}"


def _adapts_output(model: ModelFacts) -> bool:
    """Say whether an adapter of the embedding's shape meets the output (src/llama-graph.cpp, ``build_lora_mm``)."""
    changed = any(adapters.EMBEDDING in adapters.pairs(adapter) for adapter in model.adapters)
    return changed and weights.tied_output(model) is not None


def _has_cache(model: ModelFacts) -> bool:
    rules = ARCHITECTURES.get(model.hparams.architecture)
    return rules is not None and rules.cache is not Cache.NONE


def _takes_even_slots_only(model: ModelFacts, params: ContextParams) -> bool:
    # A mean is of all tokens, the micro-batch rounded up; there are outputs for no more than it has.
    averages = params.embeddings and context.pooling(model.hparams, params) == "mean"
    return averages or (model.hparams.architecture in _EVEN_SLOTS and not params.kv_unified)


def _even(n_tokens: int, n_slots: int) -> str:
    return f"--ubatch-size {n_tokens - n_tokens % n_slots}" if n_tokens > n_slots else f"--parallel {n_tokens}"


def _model_refusal(model: ModelFacts) -> str | None:
    architecture = model.hparams.architecture
    rules = ARCHITECTURES.get(architecture)
    if architecture == "clip":
        return "this file is a projector, not a language model: give the model, and this file with --mmproj"
    if not model.tensors:
        return "this file holds a vocabulary but no weights"
    if rules is not None and not rules.loadable:
        return f"llama.cpp knows the architecture {architecture} by name but cannot load it"
    if model.byte_order != "little":
        return "this file is big-endian: convert it with gguf-py's gguf_convert_endian.py"
    return model.contradiction and f"--override-kv does not go with the file's tensors: {model.contradiction}"


def _cache_refusal(model: ModelFacts, request: PlanRequest) -> str | None:
    """Return what is wrong with the cache types (``llama_init_from_model``)."""
    facts = model.hparams
    names = (request.cache_type_k or "f16", request.cache_type_v or "f16")
    for name in names:
        if name not in ggml.KV_TYPE_NAMES:
            return f"{name!r} is not a cache type; llama-server takes {', '.join(ggml.KV_TYPE_NAMES)}"
    type_k, type_v = (ggml.BY_NAME[name] for name in names)
    if (facts.is_mla or facts.architecture == "deepseek4") and type_k != type_v:
        return f"this model caches keys and values as one: --cache-type-k {names[0]} and -v {names[1]} must be the same"
    off = context.flash_attention(model, request) == "off"
    if type_v.quantized and off:
        why = "" if request.flash_attn == "off" else f", which {facts.architecture} does not support"
        return f"a quantized V cache ({names[1]}) needs flash attention{why}"
    for letter, type_, head_of in (("K", type_k, facts.head_k_of), ("V", type_v, facts.head_v_of)):
        sizes = {head_of(layer) for layer in range(facts.n_layer)} if type_.quantized and not off else set()
        for size in sorted(sizes):
            if size % type_.block:
                return (
                    f"the {letter} cache type {type_.name} works in blocks of {type_.block}, "
                    f"which do not divide this model's head size of {size}"
                )
    return None


def _split_refusal(model: ModelFacts, request: PlanRequest, kinds: Sequence[DeviceKind]) -> str | None:
    shares = request.tensor_split or ()
    if len(shares) >= MAX_DEVICES:
        return f"--tensor-split has {len(shares)} entries; llama.cpp takes fewer than {MAX_DEVICES}"
    if request.split_mode == "row" and (without := [kind for kind in kinds if kind is not DeviceKind.SYCL]):
        return f"--split-mode row needs buffers that {without[0]} devices do not have: use layer or tensor"
    rules = ARCHITECTURES.get(model.hparams.architecture)
    if request.split_mode == "tensor":
        if rules is not None and not rules.splits_tensors:
            return f"--split-mode tensor does not work with {model.hparams.architecture}: use layer"
        if request.flash_attn == "off":
            return "--split-mode tensor needs flash attention"
    return None
