"""Any request that the flag table can express."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from planner import flag_table, ggml
from planner.types import PlanRequest, Role

COUNT = st.integers(1, 2**20)
WORD = st.from_regex(r"[A-Za-z0-9_./\\|()-]{1,12}", fullmatch=True).filter(lambda word: word not in {"none", "-"})
WORDS = st.lists(WORD, min_size=1, max_size=3).map(tuple)
PAIRS = st.lists(st.tuples(WORD, st.sampled_from(["CPU", "CUDA0"])), min_size=1, max_size=3).map(tuple)
LAYERS = st.one_of(st.just("all"), st.integers(0, 200))
TYPES = st.sampled_from(ggml.KV_TYPE_NAMES)
SHARES = st.lists(st.integers(0, 100).map(float), min_size=1, max_size=15).map(tuple).filter(any)

VALUES = {
    "n_ctx": st.one_of(st.just("auto"), st.integers(0, 2**20)),
    "n_gpu_layers": LAYERS,
    "tensor_split": SHARES,
    "devices": st.lists(WORD, max_size=3).map(tuple),
    "devices_draft": st.lists(WORD, max_size=3).map(tuple),
    "split_mode": st.sampled_from(flag_table.SPLIT_MODES),
    "main_gpu": st.integers(-1, 15),
    "flash_attn": st.sampled_from(["on", "off", "auto"]),
    "load_mode": st.sampled_from(flag_table.LOAD_MODES),
    "lazy_mode": st.sampled_from(flag_table.LAZY_MODES),
    "pooling": st.sampled_from(flag_table.POOLING_TYPES),
    "override_tensor": PAIRS,
    "override_tensor_draft": PAIRS,
    "use_host_buffer": st.just(False),
    "n_gpu_layers_draft": LAYERS,
    "cache_type_k": TYPES,
    "cache_type_v": TYPES,
    "cache_type_k_draft": TYPES,
    "cache_type_v_draft": TYPES,
    "cpu_moe": st.just(True),
    "cpu_moe_draft": st.just(True),
    "swa_full": st.just(True),
    "embeddings": st.just(True),
    "reranking": st.just(True),
    "rpc": WORDS,
    "lora": WORDS,
    "override_kv": WORDS,
    "mmproj": WORD,
    "model_draft": WORD,
    "spec_type": WORD,
}
SWITCHES = {"kv_unified", "kv_offload", "repack", "op_offload", "mmproj_offload"}
# Gone into -c by the time anything is written.
NOT_WRITTEN = {"n_ctx_per_slot"}


def _role(request: PlanRequest) -> PlanRequest:
    """Give the request the role that its flags mean, as reading them does."""
    if request.reranking:
        return replace(request, role=Role.RERANK, pooling=None)
    if request.embeddings:
        return replace(request, role=Role.RERANK if request.pooling == "rank" else Role.EMBEDDING)
    return request


def plan_requests() -> st.SearchStrategy[PlanRequest]:
    """Return requests with any knobs pinned."""
    knobs = {
        flag.dest: VALUES.get(flag.dest, st.booleans() if flag.dest in SWITCHES else COUNT)
        for flag in flag_table.FLAGS
        if not flag.ours and flag.dest not in NOT_WRITTEN
    }
    passed_on = st.sampled_from([(), ("--top-k", "40"), ("--jinja", "--seed", "1")])
    return st.fixed_dictionaries({}, optional={**knobs, "passthrough": passed_on}).map(
        lambda k: _role(PlanRequest(**k))
    )
