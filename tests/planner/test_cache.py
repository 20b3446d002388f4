"""The caches' laws; the sizes themselves are held against llama.cpp's in ``test_truth``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st

from planner import cache
from planner.buffers import HOST_BUFFER, BufferType
from planner.context import context_params
from planner.model import ModelFacts, read_model
from planner.types import PlanRequest

CUDA_BUFFER = BufferType(128, pads_rows=True)
METADATA = {
    "block_count": 4,
    "context_length": 4096,
    "embedding_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 3,
}


def model_of(folder: Path, architecture: str = "llama", **metadata: Any) -> ModelFacts:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    table = [("token_embd.weight", "f16", (256, 32))]
    return read_model(str(write_header(folder / f"{architecture}.gguf", architecture, {**METADATA, **keys}, table)))


def per_layer(model: ModelFacts, buffer: BufferType = HOST_BUFFER, **knobs: Any) -> tuple[int, ...]:
    assert cache.not_built(model) is None
    return cache.layer_bytes(model, context_params(model, PlanRequest(**knobs)), buffer)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("cache"), "gemma2", attention__sliding_window=512)


def test_a_dense_layer_keeps_keys_and_values_of_every_cell(dense: ModelFacts) -> None:
    width = 3 * 64
    assert per_layer(dense, n_ctx=1024) == (2 * width * 1024 * 2,) * 4
    assert per_layer(dense, n_ctx=1024, cache_type_k="q8_0") == (width * 1024 * 2 + width // 32 * 34 * 1024,) * 4


def test_cuda_pads_a_quantized_cache_once_per_tensor(dense: ModelFacts) -> None:
    width = 3 * 64
    plain = width // 32 * 34 * 1024
    padded = -(-(plain + (512 - width) // 32 * 34) // 128) * 128
    assert per_layer(dense, CUDA_BUFFER, n_ctx=1024, cache_type_k="q8_0", cache_type_v="q8_0") == (2 * padded,) * 4


def test_a_windowed_layer_keeps_its_window_and_one_micro_batch(windowed: ModelFacts) -> None:
    full = 2 * 3 * 64 * 4096 * 2
    assert per_layer(windowed, n_ctx=4096) == (full // 4, full, full // 4, full)  # 512 + 512 of 4096
    assert per_layer(windowed, n_ctx=4096, n_ubatch=1024) == (full * 3 // 8, full, full * 3 // 8, full)
    assert per_layer(windowed, n_ctx=4096, swa_full=True) == (full,) * 4


def test_a_unified_window_holds_the_windows_of_all_slots(windowed: ModelFacts) -> None:
    apart = per_layer(windowed, n_ctx=16384, n_parallel=4)
    unified = per_layer(windowed, n_ctx=16384, n_parallel=4, kv_unified=True)
    assert apart[0] == 4 * per_layer(windowed, n_ctx=4096)[0]
    assert unified[0] == 2 * 3 * 64 * 2 * (4 * 512 + 512)


def test_latent_attention_keeps_keys_only(tmp_path: Path) -> None:
    lengths = {"attention__key_length": 96, "attention__value_length": 64, "attention__head_count_kv": 1}
    plain = model_of(tmp_path, "deepseek2", **lengths)
    latent = model_of(tmp_path, "deepseek2", **lengths, attention__key_length_mla=32, attention__value_length_mla=16)
    assert per_layer(plain, n_ctx=256) == ((96 + 64) * 256 * 2,) * 4
    assert per_layer(latent, n_ctx=256) == (96 * 256 * 2,) * 4


def test_recurrent_layers_keep_one_state_per_slot_whatever_the_context(tmp_path: Path) -> None:
    ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 512, "ssm__state_size": 16, "ssm__group_count": 1}
    model = model_of(tmp_path, "mamba2", **ssm)
    one = per_layer(model, n_ctx=512)
    assert one == (4 * (3 * (512 + 2 * 16)) + 4 * 16 * 512,) * 4
    assert per_layer(model, n_ctx=4096, n_parallel=4, cache_type_k="q8_0") == tuple(4 * size for size in one)


def test_transposed_values_take_the_widest_layers_room(tmp_path: Path) -> None:
    model = model_of(tmp_path, attention__head_count_kv=[1, 2, 0, 4])
    assert per_layer(model, n_ctx=256) == tuple(2 * 64 * heads * 512 for heads in (1, 2, 0, 4))
    assert per_layer(model, n_ctx=256, flash_attn="off") == tuple(64 * (heads + 4) * 512 for heads in (1, 2, 0, 4))


def test_layers_that_share_an_earlier_cache_take_nothing(tmp_path: Path) -> None:
    pattern = {"attention__sliding_window": 512, "attention__sliding_window_pattern": [True, False, True, False]}
    sizes = per_layer(model_of(tmp_path, "gemma4", attention__shared_kv_layers=2, **pattern), n_ctx=4096)
    assert sizes[0] > 0
    assert sizes[1] > sizes[0]
    assert sizes[2:] == (0, 0)


@pytest.mark.parametrize("architecture", ["bert", "dream"])
def test_encoders_and_diffusion_models_keep_nothing(tmp_path: Path, architecture: str) -> None:
    assert per_layer(model_of(tmp_path, architecture), n_ctx=512) == (0,) * 4


def test_the_layer_of_an_unused_draft_head_keeps_nothing(tmp_path: Path) -> None:
    sizes = per_layer(model_of(tmp_path, "glm4moe", nextn_predict_layers=1), n_ctx=512)
    assert sizes[-1] == 0
    assert all(sizes[:-1])


def test_an_unknown_architecture_is_said_to_be_beyond_the_rules(tmp_path: Path) -> None:
    assert "brandnew" in (cache.not_built(model_of(tmp_path, "brandnew")) or "")


@given(n_ctx=st.integers(1, 100_000), more=st.integers(0, 100_000), n_parallel=st.integers(1, 8))
def test_more_context_never_takes_less(windowed: ModelFacts, n_ctx: int, more: int, n_parallel: int) -> None:
    less, greater = (per_layer(windowed, n_ctx=n, n_parallel=n_parallel) for n in (n_ctx, n_ctx + more))
    assert all(low <= high for low, high in zip(less, greater, strict=True))
