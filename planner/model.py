"""What the planner needs to know of a model file: hyper-parameters and tensors, from the header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.types import ModelSummary, Role

MetadataValue = int | float | bool | str | tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table. ``shape`` is ggml's ``ne`` (innermost first), without trailing ones.

    ``type_id`` is ggml's type number (``planner.ggml``); ``offset`` is absolute in the file of its ``shard``.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    shard: int


@dataclass(frozen=True, slots=True)
class HParams:
    """Hyper-parameters as llama.cpp reads them (src/llama-model.cpp, ``load_hparams``; src/llama-hparams.cpp).

    Per-layer tuples have ``n_layer_all`` entries. ``n_layer_all`` counts NextN blocks, ``n_layer`` does not.
    """

    architecture: str
    n_layer_all: int
    n_layer_nextn: int
    n_ctx_train: int | None
    n_vocab: int
    n_embd: int
    n_embd_out: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_ff: tuple[int, ...]
    head_k: int
    head_v: int
    head_k_swa: int
    head_v_swa: int
    is_mla: bool
    n_swa: int
    swa_layers: tuple[bool, ...]
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    causal: bool
    pooling_type: int | None

    @property
    def n_layer(self) -> int:
        """Return the number of trunk blocks, NextN left out."""
        return self.n_layer_all - self.n_layer_nextn


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model: summary for readers, hyper-parameters and tensors for the rules, metadata for what is rare.

    ``tokens`` and other long arrays are not in ``metadata``: an array there is present only where it is short
    (``planner.gguf.MAX_KEPT_ARRAY``). ``shard_bytes`` are the sizes of the files of a split model.
    """

    summary: ModelSummary
    role: Role
    hparams: HParams
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, MetadataValue]
    paths: tuple[str, ...]
    shard_bytes: tuple[int, ...]

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor of that name, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)
