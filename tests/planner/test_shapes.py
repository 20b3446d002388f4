"""Metadata that is overridden so that the file's tensors no longer have the shapes which llama.cpp asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.build import PINNED_BUILD
from planner.model import read_model
from planner.refusals import refusal
from planner.search.placement import search
from planner.types import HOST, HOST_POOL, Device, DeviceKind, Machine, PlanRequest, Policy, Refused
from planner.units import GIB


@pytest.mark.parametrize(
    "override,tensor",
    [
        ("llama.block_count=int:1", "blk.1."),
        ("llama.block_count=int:40", "block"),
        ("llama.embedding_length=int:16", "token_embd.weight"),
        ("llama.attention.head_count=int:2", "blk.0.attn_"),
        ("llama.attention.head_count_kv=int:1", "blk.0.attn_k.weight"),
        ("llama.feed_forward_length=int:777", "blk.0.ffn_"),
        ("llama.attention.key_length=int:999", "blk.0.attn_"),
        ("llama.nextn_predict_layers=int:1", ".nextn."),
    ],
)
def test_an_override_that_the_tensors_contradict_is_refused(chat_model: Path, override: str, tensor: str) -> None:
    model = read_model(str(chat_model), (override,))
    reason = refusal(model, PlanRequest(override_kv=(override,)))
    assert reason is not None
    assert reason.startswith("--override-kv")
    assert tensor in reason


@pytest.mark.parametrize(
    "override",
    [
        "llama.context_length=int:99",
        "llama.attention.sliding_window=int:64",
        "tokenizer.ggml.add_bos_token=bool:false",
        "llama.rope.freq_base=float:500000",
    ],
)
def test_other_overrides_are_taken(chat_model: Path, override: str) -> None:
    model = read_model(str(chat_model), (override,))
    assert refusal(model, PlanRequest(override_kv=(override,))) is None


def test_the_search_refuses_what_llama_cpp_would_not_load(chat_model: Path) -> None:
    override = ("llama.block_count=int:1",)
    machine = Machine((), Device(HOST, DeviceKind.HOST, GIB, GIB, HOST_POOL))
    outcome = search(
        read_model(str(chat_model), override), PlanRequest(override_kv=override), machine, Policy(), PINNED_BUILD
    )
    assert isinstance(outcome, Refused)
