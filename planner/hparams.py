"""Hyper-parameters as llama.cpp reads them.

(src/llama-model.cpp, ``load_hparams``; src/llama-hparams.cpp; ``load_arch_hparams`` of src/models/*.cpp.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from planner.architectures import ARCHITECTURES, Architecture, Recurrent, Window
from planner.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.gguf import Header, MetadataValue

MAX_LAYERS: Final = 512  # LLAMA_MAX_LAYERS (src/llama-hparams.h)
MAX_UINT32: Final = (1 << 32) - 1
_DAMAGED: Final = "it is damaged: fetch it again"
_GEMMA3N_OWN_CACHE_LAYERS: Final = 20  # src/models/gemma3n.cpp
_WINDOWED_TRUNK_LAYERS: Final = 64  # src/models/exaone4.cpp


@dataclass(frozen=True, slots=True)
class HParams:
    """Hyper-parameters as llama.cpp reads them (src/llama-model.cpp, ``load_hparams``; src/llama-hparams.cpp).

    Per-layer tuples have ``n_layer_all`` entries. ``n_layer_all`` counts NextN blocks, ``n_layer`` does not.
    ``n_embd_r`` and ``n_embd_s`` are the widths of a recurrent layer's two states, ``n_layer_kv_from_start`` the number
    of first layers that own a cache where the later ones share it, ``n_cls_out`` a classifier's labels.
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
    recr_layers: tuple[bool, ...] = ()
    n_embd_r: int = 0
    n_embd_s: int = 0
    n_layer_kv_from_start: int | None = None
    n_cls_out: int = 0

    @property
    def n_layer(self) -> int:
        """Return the number of trunk blocks, NextN left out."""
        return self.n_layer_all - self.n_layer_nextn

    def head_k_of(self, layer: int) -> int:
        """Return the key head size of a layer (``n_embd_head_k``)."""
        return self.head_k_swa if self.swa_layers[layer] else self.head_k

    def head_v_of(self, layer: int) -> int:
        """Return the value head size of a layer (``n_embd_head_v``)."""
        return self.head_v_swa if self.swa_layers[layer] else self.head_v

    def n_embd_k_gqa(self, layer: int) -> int:
        """Return the width of a layer's cached keys."""
        return self.head_k_of(layer) * self.n_head_kv[layer]

    def n_embd_v_gqa(self, layer: int) -> int:
        """Return the width of a layer's cached values."""
        return self.head_v_of(layer) * self.n_head_kv[layer]


def read_hparams(path: str, header: Header, tensor_names: frozenset[str]) -> HParams:
    """Return the hyper-parameters of a model file. Raises ModelFileError where a needed one is missing or absurd."""
    keys = Keys(path, header.metadata)
    rules = ARCHITECTURES.get(keys.architecture, Architecture())
    if not rules.loadable or not tensor_names:
        return _no_model(keys, header)
    n_layer_file = _file_blocks(keys)
    n_layer_all, n_layer_nextn = _layer_counts(keys, tensor_names)
    n_head, n_head_kv, n_ff = _heads_and_widths(keys)
    n_embd = keys.integer("features_length" if keys.architecture == "wavtokenizer-dec" else "embedding_length")
    head_k, head_v = _head_sizes(keys, n_embd, n_head[0])
    trunk = n_layer_all - n_layer_nextn
    recr_layers = _recurrent_layers(keys, rules, n_layer_all, trunk, n_head_kv, n_ff)
    n_swa, swa_layers = _windows(keys, rules, n_layer_all, trunk, recr_layers)
    n_embd_r, n_embd_s = _state_widths(keys, n_embd, n_head[0], head_k)
    labels = header.array_lengths.get(f"{keys.architecture}.classifier.output_labels", 0)
    return HParams(
        architecture=keys.architecture,
        n_layer_all=n_layer_all,
        n_layer_nextn=n_layer_nextn,
        n_ctx_train=keys.integer("context_length"),
        n_vocab=header.array_lengths.get("tokenizer.ggml.tokens", keys.integer("vocab_size", 0)),
        n_embd=n_embd,
        n_embd_out=_n_embd_out(keys, n_embd),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_ff=n_ff,
        head_k=head_k,
        head_v=head_v,
        head_k_swa=keys.integer("attention.key_length_swa", head_k),
        head_v_swa=keys.integer("attention.value_length_swa", head_v),
        is_mla=rules.latent and bool(keys.integer("attention.key_length_mla", 0)),
        n_swa=n_swa,
        swa_layers=swa_layers,
        n_expert=keys.integer("expert_count", 0),
        n_expert_used=max(keys.per_layer("expert_used_count", n_layer_file, 0)),
        n_ff_exp=max(keys.per_layer("expert_feed_forward_length", n_layer_file, 0)),
        causal=_causal(keys),
        pooling_type=_pooling_type(keys),
        recr_layers=recr_layers,
        n_embd_r=n_embd_r,
        n_embd_s=n_embd_s,
        n_layer_kv_from_start=_own_cache_layers(keys, n_layer_all),
        n_cls_out=labels,
    )


class Keys:
    """A model's metadata, asked for as llama.cpp asks: by the key's name below the architecture's."""

    def __init__(self, path: str, metadata: Mapping[str, MetadataValue]) -> None:
        """Find the architecture. Raises ModelFileError where the file names none."""
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise ModelFileError(path, "names no architecture (general.architecture)", "it is not a model")
        self.architecture = architecture
        self.path = path
        self._metadata = metadata

    def has(self, name: str) -> bool:
        """Say whether the file has this key."""
        return f"{self.architecture}.{name}" in self._metadata

    def get(self, name: str) -> MetadataValue | None:
        """Return the value of this key, or None."""
        return self._metadata.get(f"{self.architecture}.{name}")

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an unsigned 32-bit value, or the default. Raises ModelFileError where there is neither."""
        value = self.get(name)
        if value is None or isinstance(value, tuple):
            if default is None:
                raise ModelFileError(self.path, f"lacks {self.architecture}.{name}", "convert the model again")
            return default
        return self._unsigned(name, value)

    def per_layer(self, name: str, n_layer: int, default: int | tuple[int, ...]) -> tuple[int, ...]:
        """Return one value per layer from an array or from a single number (``get_key_or_arr``)."""
        value = self.get(name)
        if value is None:
            return default if isinstance(default, tuple) else (default,) * n_layer
        if not isinstance(value, tuple):
            return (self._unsigned(name, value),) * n_layer
        if len(value) < n_layer:
            raise ModelFileError(
                self.path, f"{self.architecture}.{name} has {len(value)} entries for {n_layer} layers", _DAMAGED
            )
        return tuple(self._unsigned(name, entry) for entry in value[:n_layer])

    def _unsigned(self, name: str, value: object) -> int:
        if not isinstance(value, int) or not 0 <= value <= MAX_UINT32:
            raise ModelFileError(self.path, f"{self.architecture}.{name} is {value!r} where a count is due", _DAMAGED)
        return int(value)


def _no_model(keys: Keys, header: Header) -> HParams:
    """Return what can be said of a projector or a bare vocabulary: a name and a size, no layers."""
    return HParams(
        architecture=keys.architecture,
        n_layer_all=0,
        n_layer_nextn=0,
        n_ctx_train=None,
        n_vocab=header.array_lengths.get("tokenizer.ggml.tokens", 0),
        n_embd=0,
        n_embd_out=0,
        n_head=(),
        n_head_kv=(),
        n_ff=(),
        head_k=0,
        head_v=0,
        head_k_swa=0,
        head_v_swa=0,
        is_mla=False,
        n_swa=0,
        swa_layers=(),
        n_expert=0,
        n_expert_used=0,
        n_ff_exp=0,
        causal=True,
        pooling_type=None,
    )


def _layer_counts(keys: Keys, tensor_names: frozenset[str]) -> tuple[int, int]:
    """Return the number of blocks and how many of them, at the end, are NextN."""
    n_layer_all, n_layer_nextn = _file_blocks(keys), keys.integer("nextn_predict_layers", 0)
    # deepseek4 files may announce a draft head that was left out (src/models/deepseek4.cpp)
    head = f"blk.{n_layer_all - n_layer_nextn}.nextn.eh_proj.weight"
    if keys.architecture == "deepseek4" and head not in tensor_names:
        n_layer_nextn = 0
    if n_layer_nextn > n_layer_all:
        raise ModelFileError(keys.path, f"claims {n_layer_all} layers, {n_layer_nextn} of them NextN", _DAMAGED)
    if keys.architecture == "graniteswitch":  # the router is one more block (src/models/granite-switch.cpp)
        return n_layer_all + 1, 1
    return n_layer_all * _loops(keys), n_layer_nextn


def _file_blocks(keys: Keys) -> int:
    """Return the number of blocks that the file names."""
    n_layer = keys.integer("block_count")
    if not 0 < n_layer <= MAX_LAYERS:
        raise ModelFileError(keys.path, f"claims {n_layer} layers", _DAMAGED)
    return n_layer


def _loops(keys: Keys) -> int:
    """Return how often a model goes through its blocks, each time with a cache of its own (src/models/nanbeige.cpp)."""
    if keys.architecture != "nanbeige":
        return 1
    return min(keys.integer("num_loops", 1) or 1, MAX_LAYERS // _file_blocks(keys))


def _heads_and_widths(keys: Keys) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return each block's heads, KV heads and feed-forward width."""
    n_layer, loops = _file_blocks(keys), _loops(keys)
    n_head = keys.per_layer("attention.head_count", n_layer, 0)
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layer, n_head)
    n_ff = keys.per_layer("feed_forward_length", n_layer, 0)
    if keys.architecture == "graniteswitch":  # its router has one head
        return (*n_head, 1), (*n_head_kv, 1), (*n_ff, 0)
    return n_head * loops, n_head_kv * loops, n_ff * loops


def _head_sizes(keys: Keys, n_embd: int, n_head: int) -> tuple[int, int]:
    """Return the sizes of a key and of a value head; 0 where the first layer has none, as in pure recurrent models."""
    default = n_embd // n_head if n_head else 0
    if not n_head and keys.architecture != "plamo2":  # which reads the lengths whatever its first layer is
        return 0, 0
    return keys.integer("attention.key_length", default), keys.integer("attention.value_length", default)


def _recurrent_layers(
    keys: Keys, rules: Architecture, n_layer_all: int, trunk: int, n_head_kv: tuple[int, ...], n_ff: tuple[int, ...]
) -> tuple[bool, ...]:
    if rules.recurrent is Recurrent.INTERVAL:
        if keys.has("attention.recurrent_layers"):
            return tuple(map(bool, keys.per_layer("attention.recurrent_layers", n_layer_all, 0)))
        interval = keys.integer("full_attention_interval", rules.full_attention_interval) or 1
        return tuple(layer < trunk and (layer + 1) % interval != 0 for layer in range(n_layer_all))
    without_kv = tuple(not heads for heads in n_head_kv)
    return {
        Recurrent.NEVER: (False,) * n_layer_all,
        Recurrent.ALL: (True,) * n_layer_all,
        Recurrent.NO_KV_HEADS: without_kv[:trunk] + (False,) * (n_layer_all - trunk),
        Recurrent.NO_KV_HEADS_ANYWHERE: without_kv,
        Recurrent.NO_KV_HEADS_NO_FF: tuple(
            layer < trunk and without_kv[layer] and not n_ff[layer] for layer in range(n_layer_all)
        ),
    }[rules.recurrent]


def _windows(
    keys: Keys, rules: Architecture, n_layer_all: int, trunk: int, recr_layers: tuple[bool, ...]
) -> tuple[int, tuple[bool, ...]]:
    """Return the window and which layers have it (src/llama-model.cpp, ``load_swa_pattern``; ``set_swa_pattern``)."""
    n_swa = keys.integer("attention.sliding_window", rules.window_tokens or 0)
    windowed = {
        Window.NEVER: False,
        Window.ALWAYS: True,
        Window.IF_SET: n_swa > 0,
        Window.UNLESS_ZERO: n_swa > 0 or not keys.has("attention.sliding_window"),
        Window.IF_64_LAYERS: trunk == _WINDOWED_TRUNK_LAYERS,
    }[rules.window]
    if not windowed:
        return 0, (False,) * n_layer_all
    n_swa = rules.window_forced or n_swa
    if rules.window_period == 0:
        return n_swa, tuple(not recurrent for recurrent in recr_layers)
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return n_swa, tuple(map(bool, keys.per_layer("attention.sliding_window_pattern", n_layer_all, 0)))
    period = keys.integer("attention.sliding_window_pattern", rules.window_period)
    dense = 0 if rules.window_dense_first else period - 1
    return n_swa, tuple(layer < trunk and (not period or layer % period != dense) for layer in range(n_layer_all))


def _state_widths(keys: Keys, n_embd: int, n_head: int, head_k: int) -> tuple[int, int]:
    """Return the widths of a recurrent layer's states (src/llama-hparams.cpp, ``n_embd_r``, ``n_embd_s``)."""
    d_conv, d_inner = keys.integer("ssm.conv_kernel", 0), keys.integer("ssm.inner_size", 0)
    d_state, n_group = keys.integer("ssm.state_size", 0), keys.integer("ssm.group_count", 0)
    wkv, kda = keys.integer("wkv.head_size", 0), keys.integer("kda.head_dim", 0)
    shortconv = keys.integer("shortconv.l_cache", 0)
    state = n_head * head_k**2 if keys.architecture == "minimax-01" else d_state * d_inner
    if wkv:
        return keys.integer("token_shift_count", 2) * n_embd, n_embd * wkv
    if shortconv:
        return n_embd * (shortconv - 1), state
    if kda:
        return 3 * (d_conv - 1 if d_conv else 3) * n_head * kda, n_head * kda**2
    return max(d_conv - 1, 0) * (d_inner + 2 * n_group * d_state), state


def _own_cache_layers(keys: Keys, n_layer_all: int) -> int | None:
    if keys.architecture == "gemma3n":
        return _GEMMA3N_OWN_CACHE_LAYERS
    if keys.architecture == "gemma4":
        return n_layer_all - keys.integer("attention.shared_kv_layers", 0)
    return None


def _n_embd_out(keys: Keys, n_embd: int) -> int:
    if keys.architecture in {"deepseek4", "qwen4exp"}:
        return keys.integer("hyper_connection.count", 1) * n_embd
    if keys.architecture == "wavtokenizer-dec":
        return keys.integer("embedding_length")
    return keys.integer("embedding_length_out", 0) or n_embd


def _pooling_type(keys: Keys) -> int | None:
    """Return the file's pooling, None where it leaves it open (LLAMA_POOLING_TYPE_UNSPECIFIED, -1)."""
    pooling = keys.integer("pooling_type", MAX_UINT32)
    return None if pooling == MAX_UINT32 else pooling


def _causal(keys: Keys) -> bool:
    if keys.architecture in {
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
        "gemma-embedding",
    }:  # set so, whatever the file says
        return False
    return bool(keys.get("attention.causal") if keys.has("attention.causal") else True)
