"""From files to facts: shards, roles, hyper-parameters, and what is said of files that are no model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_header

from planner.errors import ModelFileError
from planner.model import ModelFacts, read_model
from planner.types import Role

BLOCKS = 4
DENSE: Mapping[str, Any] = {
    "block_count": BLOCKS,
    "context_length": 4096,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
}
TENSORS = [
    ("token_embd.weight", "q8_0", (64, 100)),
    *((f"blk.{layer}.attn_q.weight", "q4_0", (64, 64)) for layer in range(BLOCKS)),
    ("output_norm.weight", "f32", (64,)),
]


def model(folder: Path, architecture: str = "llama", **metadata: Any) -> ModelFacts:
    """Write and read a dense model with these metadata keys added; dots in keys are written as two underscores."""
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    path = write_header(folder / "model.gguf", architecture, {**DENSE, **keys}, TENSORS, tokens=100)
    return read_model(str(path))


def error_of(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_summarizes_a_model(tmp_path: Path) -> None:
    facts = model(tmp_path, general__name="Tiny", general__file_type=15)
    summary = facts.summary
    assert (summary.name, summary.architecture, summary.quantization) == ("Tiny", "llama", "Q4_K_M")
    assert (summary.n_layers, summary.n_ctx_train) == (BLOCKS, 4096)
    assert summary.n_params == 64 * 100 + BLOCKS * 64 * 64 + 64
    assert summary.tensor_bytes == 6800 + BLOCKS * 2304 + 256
    assert summary.file_bytes == (tmp_path / "model.gguf").stat().st_size
    assert facts.hparams.n_vocab == 100


def test_names_the_prevailing_type_where_the_file_names_no_mix(tmp_path: Path) -> None:
    assert model(tmp_path).summary.quantization == "Q4_0"


@pytest.mark.parametrize(
    "architecture,metadata,role",
    [
        ("llama", {}, Role.CHAT),
        ("llama", {"pooling_type": 0}, Role.CHAT),
        ("qwen3", {"pooling_type": 3}, Role.EMBEDDING),
        ("qwen3", {"pooling_type": 4}, Role.RERANK),
        ("bert", {"pooling_type": 1}, Role.EMBEDDING),
        ("bert", {"pooling_type": 4}, Role.RERANK),
        ("nomic-bert", {}, Role.EMBEDDING),
    ],
)
def test_tells_what_a_model_is_for(tmp_path: Path, architecture: str, metadata: dict[str, int], role: Role) -> None:
    assert model(tmp_path, architecture, **metadata).role is role


def test_a_number_of_heads_holds_for_all_layers_and_an_array_for_each(tmp_path: Path) -> None:
    one = model(tmp_path).hparams
    assert (one.n_head, one.n_head_kv) == ((4,) * BLOCKS, (4,) * BLOCKS)
    each = model(tmp_path, attention__head_count_kv=[1, 2, 0, 4]).hparams
    assert each.n_head_kv == (1, 2, 0, 4)
    assert (each.head_k, each.head_v) == (16, 16)


def test_draft_layers_count_as_layers_but_not_as_trunk(tmp_path: Path) -> None:
    hparams = model(tmp_path, "glm4moe", nextn_predict_layers=1).hparams
    assert (hparams.n_layer_all, hparams.n_layer_nextn, hparams.n_layer) == (4, 1, 3)


@pytest.mark.parametrize(
    "architecture,metadata,windowed",
    [
        ("llama", {"attention.sliding_window": 512}, (False, False, False, False)),
        ("gemma3", {}, (False, False, False, False)),
        ("gemma3", {"attention.sliding_window": 512}, (True, True, True, True)),
        ("gemma2", {}, (True, False, True, False)),
        ("gpt-oss", {"attention.sliding_window": 128}, (True, False, True, False)),
        ("cohere2moe", {"attention.sliding_window": 128}, (False, True, True, True)),
        ("llama4", {"attention.sliding_window": 0}, (False, False, False, False)),
        ("llama4", {}, (True, True, True, False)),
        ("olmo2", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}, (True, False, True, False)),
        (
            "mimo2",
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False, False, True]},
            (True, False, False, True),
        ),
    ],
)
def test_windows_alternate_as_the_architecture_or_the_file_has_it(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], windowed: tuple[bool, ...]
) -> None:
    assert model(tmp_path, architecture, **metadata).hparams.swa_layers == windowed


@pytest.mark.parametrize(
    "architecture,metadata,recurrent",
    [
        ("llama", {"attention.head_count_kv": [0, 1, 1, 1]}, (False, False, False, False)),
        ("jamba", {"attention.head_count_kv": [0, 1, 0, 0]}, (True, False, True, True)),
        ("mamba", {}, (True, True, True, True)),
        ("qwen3next", {"full_attention_interval": 2}, (True, False, True, False)),
        ("qwen3next", {"attention.recurrent_layers": [0, 0, 1, 1]}, (False, False, True, True)),
    ],
)
def test_recurrent_layers_are_told_from_attention(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], recurrent: tuple[bool, ...]
) -> None:
    assert model(tmp_path, architecture, **metadata).hparams.recr_layers == recurrent


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def shards(folder: Path) -> list[Path]:
    """Write a model in three files."""
    paths = []
    for number, tensors in enumerate((TENSORS[:2], TENSORS[2:4], TENSORS[4:])):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(TENSORS)}
        path = folder / f"model-{number + 1:05}-of-00003.gguf"
        paths.append(write_header(path, "llama", {**(DENSE if number == 0 else {}), **split}, tensors))
    return paths


def test_a_split_model_is_read_as_one(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    facts = read_model(str(paths[0]))
    assert facts.paths == tuple(map(str, paths))
    assert [tensor.name for tensor in facts.tensors] == [name for name, _, _ in TENSORS]
    assert [tensor.shard for tensor in facts.tensors] == [0, 0, 1, 1, 2, 2]
    assert facts.summary.file_bytes == sum(facts.shard_bytes) == sum(path.stat().st_size for path in paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    assert f"{paths[1]} is missing" in error_of(paths[0])


def test_a_later_shard_points_to_the_first(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    assert f"give {paths[0]}" in error_of(paths[1])


def test_a_shard_of_another_model_is_noticed(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    assert "is not file 3" in error_of(paths[0])


def test_a_renamed_split_model_says_how_it_must_be_named(tmp_path: Path) -> None:
    renamed = shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    assert "-00001-of-00003.gguf" in error_of(renamed)


# ---------------------------------------------------------------------------------------------------------------------
# What is no model


def test_a_missing_file_a_directory_and_a_pipe_are_told_apart(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "absent.gguf")
    assert "is a directory" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in error_of(tmp_path / "pipe.gguf")


def test_a_projector_and_a_bare_vocabulary_are_read_as_what_they_are(tmp_path: Path) -> None:
    projector = write_header(tmp_path / "mmproj.gguf", "clip", {"vision.block_count": 2}, TENSORS[:1])
    assert read_model(str(projector)).hparams.architecture == "clip"
    vocabulary = write_header(tmp_path / "vocab.gguf", "llama", {}, [], tokens=50)
    facts = read_model(str(vocabulary))
    assert (facts.tensors, facts.hparams.n_vocab) == ((), 50)


@pytest.mark.parametrize(
    "metadata,problem",
    [
        ({"block_count": 0}, "0 layers"),
        ({"block_count": 100_000}, "100000 layers"),
        ({"attention.head_count": [4, 4]}, "2 entries for 4 layers"),
        ({"embedding_length": "wide"}, "'wide' where a count is due"),
        ({"nextn_predict_layers": 9}, "9 of them NextN"),
    ],
)
def test_absurd_hyper_parameters_are_named(tmp_path: Path, metadata: dict[str, Any], problem: str) -> None:
    path = write_header(tmp_path / "model.gguf", "llama", {**DENSE, **metadata}, TENSORS)
    assert problem in error_of(path)


def test_a_file_without_a_needed_key_says_which(tmp_path: Path) -> None:
    keys = {key: value for key, value in DENSE.items() if key != "block_count"}
    assert "lacks llama.block_count" in error_of(write_header(tmp_path / "model.gguf", "llama", keys, TENSORS))


def test_an_unknown_architecture_is_still_read(tmp_path: Path) -> None:
    facts = model(tmp_path, "brandnew")
    assert (facts.hparams.architecture, facts.hparams.n_layer_all) == ("brandnew", BLOCKS)
