"""Context parameters, and the flags that llama.cpp would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import write_header
from hypothesis import given
from hypothesis import strategies as st

from planner.context import ContextParams, context_params
from planner.errors import InvalidRequest
from planner.flags import parse
from planner.model import ModelFacts, read_model
from planner.refusals import aborts, refusal
from planner.types import DeviceKind, PlanRequest, Role

BASE = {
    "block_count": 2,
    "context_length": 8192,
    "embedding_length": 128,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
}
TENSORS = [("token_embd.weight", "f16", (128, 32)), ("output_norm.weight", "f32", (128,))]


def model_of(folder: Path, architecture: str = "llama", **metadata: Any) -> ModelFacts:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return read_model(str(write_header(folder / f"{architecture}.gguf", architecture, {**BASE, **keys}, TENSORS)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return model_of(tmp_path_factory.mktemp("context"))


def params(model: ModelFacts, **knobs: Any) -> ContextParams:
    return context_params(model, PlanRequest(**knobs))


def test_unset_knobs_take_llama_servers_defaults(model: ModelFacts) -> None:
    made = params(model)
    assert (made.n_ctx, made.n_ctx_seq, made.n_seq_max, made.n_stream) == (8192, 8192, 1, 1)
    assert (made.n_batch, made.n_ubatch, made.n_outputs_max) == (2048, 512, 1)
    assert (made.cache_type_k, made.cache_type_v, made.flash_attn) == ("f16", "f16", "auto")
    assert made.kv_offload
    assert made.cache_ram_mib == 8192


@pytest.mark.parametrize(
    "n_ctx,n_parallel,unified,expected",
    [
        (1000, 1, False, (1024, 1024)),
        (1000, 4, False, (1024, 256)),
        (1100, 4, False, (2048, 512)),  # each slot is padded up, and the sum with it
        (1100, 4, True, (1280, 1280)),
        (0, 3, False, (24576, 8192)),
        (0, 3, True, (8192, 8192)),
    ],
)
def test_contexts_are_padded_as_llama_cpp_pads_them(
    model: ModelFacts, n_ctx: int, n_parallel: int, expected: tuple[int, int], *, unified: bool
) -> None:
    made = params(model, n_ctx=n_ctx, n_parallel=n_parallel, kv_unified=unified)
    assert (made.n_ctx, made.n_ctx_seq) == expected


@given(per_slot=st.integers(1, 100_000), n_parallel=st.integers(1, 64), unified=st.booleans())
def test_every_slot_gets_at_least_what_it_was_promised(
    model: ModelFacts, per_slot: int, n_parallel: int, *, unified: bool
) -> None:
    made = params(model, n_ctx_per_slot=per_slot, n_parallel=n_parallel, kv_unified=unified)
    assert made.n_ctx // n_parallel >= per_slot
    assert made.n_ctx_seq * made.n_stream == made.n_ctx
    assert made.n_ctx_seq % 256 == 0


def test_the_batch_is_bounded_by_the_context_before_padding(model: ModelFacts) -> None:
    made = params(model, n_ctx=100)
    assert (made.n_ctx, made.n_batch, made.n_ubatch) == (256, 100, 100)


def test_an_embedding_server_puts_a_whole_input_into_one_micro_batch(model: ModelFacts) -> None:
    made = params(model, role=Role.EMBEDDING)
    assert made.embeddings
    assert (made.n_batch, made.n_ubatch, made.n_outputs_max) == (512, 512, 512)


def test_a_pooling_alone_makes_room_for_outputs_but_embeds_nothing(model: ModelFacts) -> None:
    made = params(model, pooling="mean", n_ctx=1000)
    assert not made.embeddings
    assert (made.n_batch, made.n_ubatch, made.n_outputs_max) == (1000, 512, 2048)
    assert params(model, pooling="none").n_outputs_max == 1


@pytest.mark.parametrize(
    "knobs,effective",
    [
        ({}, "auto"),
        ({"flash_attn": "auto", "cache_type_k": "q8_0"}, "auto"),
        ({"flash_attn": "auto", "cache_type_v": "q8_0"}, "on"),
        ({"cache_type_v": "q8_0"}, "on"),
        ({"split_mode": "tensor"}, "on"),
        ({"flash_attn": "off"}, "off"),
    ],
)
def test_what_needs_flash_attention_turns_it_on(model: ModelFacts, knobs: dict[str, Any], effective: str) -> None:
    assert params(model, **knobs).flash_attn == effective


@pytest.mark.parametrize(
    "words,n_outputs_max",  # as really loading servers reserved
    [
        ("", 2),
        ("--spec-type ngram-simple", 98),
        ("--spec-type ngram-map-k --spec-ngram-map-k-size-m 3", 8),
        ("--spec-type ngram-map-k,ngram-cache --spec-ngram-map-k-size-m 3", 18),
        ("--spec-type ngram-mod --spec-draft-n-max 5", 130),
        ("--spec-type ngram-mod --spec-ngram-mod-n-max 100", 202),
        ("--spec-type ngram-cache,none", 2),
        ("--spec-default", 130),
        ("--spec-default --spec-type ngram-cache", 130),
    ],
)
def test_tokens_drafted_from_the_text_itself_need_outputs_and_nothing_else(
    model: ModelFacts, words: str, n_outputs_max: int
) -> None:
    made = context_params(model, parse(["-np", "2", *words.split()]).request)
    assert made.n_outputs_max == n_outputs_max
    assert made.n_rs_seq == 0
    assert not made.not_built


def test_a_model_that_attends_both_ways_does_not_bound_its_batch(tmp_path: Path) -> None:
    made = params(model_of(tmp_path, "bert", attention__causal=False), n_ctx=100)
    assert (made.n_batch, made.n_ubatch) == (2048, 512)


def test_overrides_come_in_llama_servers_order(model: ModelFacts) -> None:
    made = params(model, override_tensor=(("output", "CUDA0"),), n_cpu_moe=1, n_cpu_ffn=1)
    assert [place for _, place in made.overrides] == ["CUDA0", "CPU", "CPU"]
    assert made.overrides[1][0].startswith(r"blk\.(0)\.ffn_(up|down|gate|gate_up)")


@pytest.mark.parametrize(
    "knobs,problem",
    [
        ({"spec_type": "ngram-foo"}, "ngram-foo: expected none"),
        ({"n_parallel": 0}, "--parallel: 0"),
        ({"n_parallel": 257}, "--parallel: 257"),
        ({"n_ctx": -1}, "--ctx-size: -1"),
        ({"n_batch": 0}, "--batch-size: 0"),
        ({"override_tensor": (("blk.(", "CPU"),)}, "not a regular expression"),
    ],
)
def test_values_out_of_range_are_named(model: ModelFacts, knobs: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem.replace("(", r"\(")):
        params(model, **knobs)


@pytest.mark.parametrize(
    "architecture,metadata,knobs,reason",
    [
        ("llama", {}, {"cache_type_v": "q8_0", "flash_attn": "off"}, "needs flash attention"),
        ("llama", {}, {"cache_type_k": "q6_K"}, "is not a cache type"),
        ("llama", {"attention__key_length": 80}, {"cache_type_k": "q8_0"}, "head size of 80"),
        ("grok", {}, {"cache_type_v": "q4_0"}, "grok does not support"),
        (
            "deepseek2",
            {"attention__key_length_mla": 64, "attention__value_length_mla": 64},
            {"cache_type_k": "f16", "cache_type_v": "bf16"},
            "must be the same",
        ),
        ("llama", {}, {"split_mode": "row"}, "--split-mode row"),
        ("mamba", {}, {"split_mode": "tensor"}, "does not work with mamba"),
        ("llama", {}, {"tensor_split": (1.0,) * 16}, "16 entries"),
        ("clip", {}, {}, "projector"),
        ("gptj", {}, {}, "cannot load"),
    ],
)
def test_what_llama_cpp_refuses_is_refused_with_its_reason(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], knobs: dict[str, Any], reason: str
) -> None:
    model = model_of(tmp_path, architecture, **metadata)
    assert reason in (refusal(model, PlanRequest(**knobs), [DeviceKind.CUDA]) or "")


def test_of_several_reasons_the_one_is_told_that_llama_cpp_meets_first(tmp_path: Path) -> None:
    """A model is loaded before its context is made (as seen with really loading servers)."""
    both = PlanRequest(split_mode="row", flash_attn="off", cache_type_v="q8_0")
    assert "--split-mode row" in str(refusal(model_of(tmp_path), both, [DeviceKind.RPC]))
    both = PlanRequest(split_mode="tensor", flash_attn="off", cache_type_v="q8_0")
    assert "--split-mode tensor" in str(refusal(model_of(tmp_path), both, [DeviceKind.RPC]))


@pytest.mark.parametrize(
    "knobs",
    [{}, {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}, {"cache_type_k": "q8_0", "flash_attn": "off"}],
)
def test_what_llama_cpp_takes_is_not_refused(model: ModelFacts, knobs: dict[str, Any]) -> None:
    assert refusal(model, PlanRequest(**knobs), [DeviceKind.CUDA]) is None


def test_files_that_are_no_model_for_this_machine_are_refused(tmp_path: Path) -> None:
    vocabulary = read_model(str(write_header(tmp_path / "vocab.gguf", "llama", {}, [], tokens=9)))
    assert "no weights" in (refusal(vocabulary, PlanRequest()) or "")
    foreign = write_header(tmp_path / "big.gguf", "llama", BASE, TENSORS, endian=gguf.GGUFEndian.BIG)
    assert "big-endian" in (refusal(read_model(str(foreign)), PlanRequest()) or "")


@pytest.mark.parametrize(
    "architecture,knobs,cure",  # seen with really loading servers, as was that the cure is one
    [
        ("kimi-linear", {"n_parallel": 3, "n_ubatch": 512}, "--ubatch-size 510"),
        ("kimi-linear", {"n_parallel": 3, "n_ubatch": 510}, None),
        ("kimi-linear", {"n_parallel": 3, "n_ubatch": 512, "kv_unified": True}, None),
        ("llama", {"n_parallel": 3, "n_ubatch": 512}, None),
        ("llama", {"n_parallel": 7, "embeddings": True, "pooling": "mean"}, "--ubatch-size 511"),
        ("llama", {"n_parallel": 7, "embeddings": True, "pooling": "mean", "kv_unified": True}, "--ubatch-size 511"),
        ("llama", {"n_parallel": 8, "embeddings": True, "pooling": "mean"}, None),
        ("llama", {"n_parallel": 7, "embeddings": True, "pooling": "last"}, None),
        ("llama", {"n_parallel": 7, "pooling": "mean"}, None),  # without --embeddings nothing is pooled
        ("llama", {"n_parallel": 3, "n_batch": 2, "n_ubatch": 1}, "--batch-size 3"),
        ("llama", {"n_parallel": 3, "n_ubatch": 1, "embeddings": True}, "--ubatch-size 3"),
        ("llama", {"n_parallel": 3, "n_ubatch": 1}, None),
        ("plm", {"flash_attn": "on"}, "--flash-attn off"),
        ("plm", {"flash_attn": "off"}, None),
        ("llama", {"n_batch": 1}, "--batch-size 2"),
        ("llama", {"n_batch": 2, "n_ubatch": 1}, None),
        ("llama", {"n_ctx": 1}, "--ctx-size 2"),
        ("llama", {"n_ubatch": 1, "embeddings": True}, "--ubatch-size 2"),
        ("bert", {"n_batch": 1, "embeddings": True}, None),  # without a cache nothing is tried
        ("qwen4exp", {"embeddings": True}, "go without --embeddings"),
        ("t5", {}, "as t5 has to"),
        ("t5encoder", {"n_parallel": 2, "embeddings": True}, "--kv-unified"),
        ("t5encoder", {"n_parallel": 2, "embeddings": True, "kv_unified": True}, None),
    ],
)
def test_what_llama_server_does_not_survive_is_told(
    tmp_path: Path, architecture: str, knobs: dict[str, Any], cure: str | None
) -> None:
    model = model_of(tmp_path, architecture)
    reason = aborts(model, params(model, **{"n_ctx": 4096, **knobs}))
    assert (reason is not None) == (cure is not None)
    assert cure is None or str(reason).endswith(cure)


@pytest.mark.parametrize("n_expert,n_used", [(4, 5), (0, 2), (4, 0)])
def test_a_routing_that_llama_cpp_asserts_against_is_told(tmp_path: Path, n_expert: int, n_used: int) -> None:
    model = model_of(tmp_path, expert_count=n_expert, expert_used_count=n_used)
    assert f"of its {n_expert} experts {n_used} are used" in str(aborts(model, params(model)))
