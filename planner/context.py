"""Context parameters as llama-server hands them to llama.cpp: every knob effective, nothing left open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planner import adapters, ggml, overrides, speculation
from planner.architectures import ARCHITECTURES
from planner.errors import InvalidRequest
from planner.flag_table import POOLING_TYPES
from planner.types.request import FlashAttention, LoadMode, Role, SplitMode

if TYPE_CHECKING:
    from planner.model import HParams, ModelFacts
    from planner.types.request import PlanRequest

N_BATCH: Final = 2048  # common/common.h, common_params
N_UBATCH: Final = 512
CACHE_RAM_MIB: Final = 8192
N_CTX_CHECKPOINTS: Final = 32
CONTEXT_ALIGNMENT: Final = 256  # src/llama-context.cpp, constructor
MAX_PARALLEL: Final = 256  # LLAMA_MAX_SEQ (src/llama-cparams.h)
MAX_CONTEXT: Final = (1 << 31) - 1  # -c is parsed as a C int


@dataclass(frozen=True, slots=True)
class ContextParams:
    """The effective parameters of one llama_context (src/llama-context.cpp, constructor; tools/server/*.cpp).

    ``n_ctx`` is padded and is the sum over streams, ``n_ctx_seq`` what one sequence has, ``n_stream`` the number of
    separate caches (1 when unified). ``n_outputs_max`` is llama-server's, not llama-fit-params'. ``n_ctx_unpadded`` is
    what ``-c`` has to say for these figures: the batch is bounded by it. ``not_built`` names the flags that are set and
    whose bytes no rule here covers.
    """

    n_ctx: int
    n_ctx_seq: int
    n_seq_max: int
    n_stream: int
    n_batch: int
    n_ubatch: int
    n_outputs_max: int
    kv_unified: bool
    flash_attn: FlashAttention
    cache_type_k: str
    cache_type_v: str
    kv_offload: bool
    op_offload: bool
    swa_full: bool
    split_mode: SplitMode
    load_mode: LoadMode
    lazy_mode: str
    use_host_buffer: bool
    repack: bool
    embeddings: bool
    overrides: tuple[tuple[str, str], ...]  # (regex, buffer type) in llama.cpp's order: -ot, -cmoe, -ncmoe, -ncffn
    n_ctx_unpadded: int = 0
    cache_ram_mib: int = CACHE_RAM_MIB
    n_ctx_checkpoints: int = 0  # of each slot, where it completes texts
    pooling: str | None = None  # of embeddings; None: the model's own
    loads_draft_head: bool = False  # the NextN layers (load_mtp)
    n_rs_seq: int = 0  # older recurrent states that each sequence keeps
    applies_adapters: bool = True
    of_draft_head: bool = False  # this is the context of the NextN layers (LLAMA_CONTEXT_TYPE_MTP)
    not_built: tuple[str, ...] = ()

    @property
    def v_trans(self) -> bool:
        """Say whether V is stored transposed: only with flash attention off ("auto" is laid out as on)."""
        return self.flash_attn == "off"


def context_params(model: ModelFacts, request: PlanRequest) -> ContextParams:
    """Return the parameters that llama-server would use for this request; what is not pinned takes its default.

    A context of ``None``, 0 or ``"auto"`` is the trained length for every slot. Raises InvalidRequest for a number out
    of range or a pattern that is no regular expression.
    """
    n_parallel = _bounded("--parallel", request.slots, 1, 1, MAX_PARALLEL)
    kv_unified = bool(request.kv_unified)
    n_ctx_unpadded = _n_ctx(model, request, 1 if kv_unified else n_parallel, n_parallel)
    embeddings = _embeds(request)
    n_batch = _bounded("--batch-size", request.n_batch, N_BATCH, 1, MAX_CONTEXT)
    n_ubatch = _bounded("--ubatch-size", request.n_ubatch, N_UBATCH, 1, MAX_CONTEXT)
    if embeddings:  # all tokens of an input in one micro-batch (tools/server/server.cpp)
        n_batch = min(n_batch, n_ubatch)
    rules = ARCHITECTURES.get(model.hparams.architecture)
    every_token = embeddings or _pools(request)
    n_outputs_max = n_batch if every_token else min(n_batch, n_parallel * (1 + speculation.n_draft(request)))
    if model.hparams.causal:
        n_batch = min(n_ctx_unpadded, n_batch)
    if rules is not None and rules.encodes:
        n_outputs_max = n_batch
    n_ctx = ggml.pad(n_ctx_unpadded, CONTEXT_ALIGNMENT)
    n_ctx_seq = n_ctx if kv_unified else ggml.pad(n_ctx // n_parallel, CONTEXT_ALIGNMENT)
    return ContextParams(
        n_ctx=n_ctx if kv_unified else n_ctx_seq * n_parallel,
        n_ctx_seq=n_ctx_seq,
        n_seq_max=n_parallel,
        n_stream=1 if kv_unified else n_parallel,
        n_batch=n_batch,
        n_ubatch=min(n_batch, n_ubatch),
        n_outputs_max=n_outputs_max,
        kv_unified=kv_unified,
        flash_attn=flash_attention(model, request),
        cache_type_k=request.cache_type_k or "f16",
        cache_type_v=request.cache_type_v or "f16",
        kv_offload=request.kv_offload is not False,
        op_offload=request.op_offload is not False,
        swa_full=bool(request.swa_full),
        split_mode=request.split_mode or "layer",
        load_mode=request.load_mode or "auto",
        lazy_mode=request.lazy_mode or "auto",
        use_host_buffer=request.use_host_buffer is not False,
        repack=request.repack is not False,
        embeddings=embeddings,
        overrides=_overrides(request, model.hparams.n_layer_all),
        n_ctx_unpadded=n_ctx_unpadded,
        cache_ram_mib=CACHE_RAM_MIB if request.cache_ram_mib is None else request.cache_ram_mib,
        n_ctx_checkpoints=0 if embeddings else _checkpoints(request),
        pooling=_pooling(request),
        loads_draft_head=speculation.uses_own_head(request),
        n_rs_seq=speculation.n_rs_seq(model, request),
        applies_adapters=adapters.UNAPPLIED not in request.passthrough,
        not_built=_not_built(model, request),
    )


def _checkpoints(request: PlanRequest) -> int:
    return N_CTX_CHECKPOINTS if request.ctx_checkpoints is None else request.ctx_checkpoints


def _not_built(model: ModelFacts, request: PlanRequest) -> tuple[str, ...]:
    missing = []
    if (request.override_kv or ()) != model.overrides:
        missing.append("overridden metadata that was not read (--override-kv)")
    if len(adapters.files(request)) != len(model.adapters):
        missing.append("LoRA adapters that were not read (--lora)")
    if request.mmproj and model.projector is None:
        missing.append("a projector that was not read (--mmproj)")
    if reason := speculation.without_rule(model, request):
        missing.append(reason)
    return tuple(missing)


def pooling(hparams: HParams, params: ContextParams) -> str:
    """Return how embeddings are pooled: as the flag says, or else the header (src/llama-context.cpp, constructor)."""
    return params.pooling or POOLING_TYPES[hparams.pooling_type or 0]


def _n_ctx(model: ModelFacts, request: PlanRequest, n_stream: int, n_parallel: int) -> int:
    """Return ``-c`` before padding: what is asked for, or the trained length for each stream (common/fit.cpp)."""
    if request.n_ctx_per_slot:
        tokens = request.n_ctx_per_slot * n_parallel
    elif request.n_ctx and request.n_ctx != "auto":
        tokens = request.n_ctx
    else:
        tokens = (model.hparams.n_ctx_train or 0) * n_stream
    return _bounded("--ctx-size", tokens, tokens, 1, MAX_CONTEXT - CONTEXT_ALIGNMENT * MAX_PARALLEL)


def _embeds(request: PlanRequest) -> bool:
    """Say whether llama-server is started to embed or to rank, which a pooling alone does not do (common/arg.cpp)."""
    return bool(request.embeddings or request.reranking) or request.role is not Role.CHAT


def _pools(request: PlanRequest) -> bool:
    """Say whether a pooling makes room for an output of every token, used or not (``server_output_limits``)."""
    return request.pooling is not None and request.pooling != "none"


def _pooling(request: PlanRequest) -> str | None:
    ranks = request.reranking or request.role is Role.RERANK
    return request.pooling or ("rank" if ranks else None)


def flash_attention(model: ModelFacts, request: PlanRequest) -> FlashAttention:
    """Return the effective setting: "off" where the architecture cannot, "on" where something else needs it.

    (src/llama-context.cpp, ``llama_init_from_model``.)
    """
    rules = ARCHITECTURES.get(model.hparams.architecture)
    if rules is not None and not rules.flash_attention:
        return "off"
    asked = request.flash_attn or "auto"
    type_v = ggml.BY_NAME.get(request.cache_type_v or "f16")
    needed = request.split_mode == "tensor" or (type_v is not None and type_v.quantized)
    return "on" if asked == "auto" and needed else asked


def _overrides(request: PlanRequest, n_layer_all: int) -> tuple[tuple[str, str], ...]:
    """Return all pairs of pattern and buffer type, the user's own first; none for layers that are not there."""
    to_cpu = overrides.to_cpu(
        cpu_moe=request.cpu_moe, n_cpu_moe=request.n_cpu_moe, n_cpu_ffn=request.n_cpu_ffn, n_layer=n_layer_all
    )
    pairs = (*(request.override_tensor or ()), *to_cpu)
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidRequest(f"--override-tensor: {pattern!r} is not a regular expression ({error})") from error
    return pairs


def _bounded(flag: str, value: int | None, default: int, low: int, high: int) -> int:
    """Return the value or its default. Raises InvalidRequest where it is out of range."""
    if value is None:
        return default
    if not low <= value <= high:
        raise InvalidRequest(f"{flag}: {value} is not between {low} and {high}")
    return value
