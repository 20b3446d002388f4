"""The vocabulary of the architecture table: caches, windows, recurrent layers, and what of a file is left out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Cache(StrEnum):
    """Which memory class llama.cpp gives a model (src/llama-model.cpp, ``create_memory``)."""

    NONE = "none"
    ATTENTION = "attention"  # K and V per layer, a second cache for windowed layers; K only with latent attention
    RECURRENT = "recurrent"
    HYBRID = "hybrid"  # recurrent and attention layers side by side
    HYBRID_INDEXED = "hybrid-indexed"
    SPARSE = "sparse"  # latent attention with an indexer (llama-kv-cache-dsa.cpp, -dsa-iswa.cpp)
    SPARSE_BLOCKS = "sparse-blocks"  # llama-kv-cache-msa.cpp
    COMPRESSED = "compressed"  # llama-kv-cache-dsv4.cpp
    BORROWED = "borrowed"  # every layer reads the target model's cache


class Window(StrEnum):
    """When a model's windowed layers count as such (``load_arch_hparams`` of each architecture)."""

    NEVER = "never"
    ALWAYS = "always"
    IF_SET = "if the file names a window above 0"
    UNLESS_ZERO = "unless the file names a window of 0"
    IF_64_LAYERS = "if the trunk has 64 layers"


class Recurrent(StrEnum):
    """Which layers are recurrent."""

    NEVER = "never"
    ALL = "all"
    NO_KV_HEADS = "trunk layers with head_count_kv 0"
    NO_KV_HEADS_ANYWHERE = "layers with head_count_kv 0"
    NO_KV_HEADS_NO_FF = "trunk layers with neither KV heads nor a feed-forward part"
    INTERVAL = "trunk layers that are no multiple of full_attention_interval, or as recurrent_layers says"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture's rules. The defaults are the common case: dense attention, output tied if absent.

    ``window_period`` is llama.cpp's default for ``attention.sliding_window_pattern``: every n-th layer attends to
    everything (the first of each group with ``dense_first``); 0 means all layers are windowed; None that the file must
    say. ``window_tokens`` is the window where the file names none, ``window_forced`` whatever it says.
    ``nextn_loaded`` matches tensors of NextN layers that are loaded although no draft uses them; None loads all.
    """

    cache: Cache = Cache.ATTENTION
    window: Window = Window.NEVER
    window_period: int | None = None
    window_dense_first: bool = False
    window_tokens: int | None = None
    window_forced: int | None = None
    recurrent: Recurrent = Recurrent.NEVER
    full_attention_interval: int = 4
    latent: bool = False  # reads key_length_mla and value_length_mla
    indexer_types: bool = False  # reads attention.indexer.types: some layers may lack an indexer
    trunk_only: bool = False  # the filters of a hybrid or sparse cache leave NextN layers out
    ties_output: bool = True
    duplicate_first: bool = False  # requests the tied output before token_embd, so both stay (gemma3n, gemma4)
    nextn_loaded: str | None = None
    encodes: bool = False  # has an encoder pass, whose every token is an output (llama_model_has_encoder)
    embeds: bool = False  # encoders: served for embeddings whatever the file's pooling type
    lazy_embedding: bool = False  # per_layer_token_embd may be mapped on demand
    flash_attention: bool = True
    splits_tensors: bool = True  # takes -sm tensor
    loadable: bool = True
