"""Context parameters as llama-server hands them to llama.cpp: every knob effective, nothing left open."""

from __future__ import annotations

from dataclasses import dataclass

from planner.types import FlashAttention, LoadMode, SplitMode


@dataclass(frozen=True, slots=True)
class ContextParams:
    """The effective parameters of one llama_context (src/llama-context.cpp; tools/server/server-context.cpp).

    ``n_ctx`` is padded and is the sum over streams, ``n_ctx_seq`` what one sequence has, ``n_stream`` the number of
    separate caches (1 when unified). ``n_outputs_max`` is llama-server's, not llama-fit-params'.
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

    @property
    def v_trans(self) -> bool:
        """Say whether V is stored transposed: only with flash attention off ("auto" is laid out as on)."""
        return self.flash_attn == "off"
