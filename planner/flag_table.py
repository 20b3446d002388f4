"""The one flag table: the parser, the launch command and the JSON ``request`` all derive from it.

Spellings are llama-server's (common/arg.cpp of the pinned build), so that a command line which works there can be
pasted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from planner.flag_values import (
    MAX_DEVICES,
    MAX_INT,
    choice,
    device_names,
    items,
    join,
    join_devices,
    join_overrides,
    join_proportions,
    number,
    number_or,
    proportions,
    tensor_overrides,
)
from planner.ggml import KV_TYPE_NAMES

SPLIT_MODES: Final = ("none", "layer", "row", "tensor")
LOAD_MODES: Final = ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
LAZY_MODES: Final = ("on", "auto", "off")
POOLING_TYPES: Final = ("none", "mean", "cls", "last", "rank")  # enum llama_pooling_type, from 0


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: where its value goes, how it is spelled, read and written.

    ``on`` are the spellings that set a value (or True), ``off`` those that set False; the first of each is the one we
    write. Without ``parse`` it is a switch. ``gathers``: repeated, its values add up, as in llama-server. ``ours``: the
    planner's own flag, which llama-server never sees. ``launch`` False: it has gone into other flags by then.
    """

    dest: str
    on: tuple[str, ...]
    help: str
    off: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    gathers: bool = False
    ours: bool = False
    launch: bool = True

    def words(self, value: Any) -> tuple[str, ...]:
        """Return the words that set this value on a llama-server command line; none where no spelling exists."""
        if self.parse is not None:
            return (self.on[0], self.write(value))
        names = self.on if value else self.off
        return names[:1]


_AUTO_CONTEXT: Final = {"auto": "auto"}
_AUTO_LAYERS: Final = {"auto": "auto", "all": "all", "-1": "auto", "-2": "all"}
_AUTO_SLOTS: Final = {"auto": "auto", "-1": "auto"}
# Read as unsigned numbers, and bounded by the context or the batch (src/llama-context.cpp, constructor).
_UNBOUNDED: Final = {"-1": MAX_INT}
_BOUNDED_BY_BATCH: Final = {"0": MAX_INT, "-1": MAX_INT}
_SWITCH_WORDS: Final = {  # common/arg.cpp, is_truthy, is_falsey and is_autoy
    **dict.fromkeys(("1", "true", "enabled"), "on"),
    **dict.fromkeys(("0", "false", "disabled"), "off"),
    "-1": "auto",
}
_TYPES: Final = "|".join(KV_TYPE_NAMES)

# In the order of the launch command: --rpc makes the devices that later flags name, so it comes first.
FLAGS: Final = (
    Flag("rpc", ("--rpc",), "llama.cpp RPC workers", (), "HOST:PORT,...", items, join, gathers=True),
    Flag("devices", ("--device", "-dev"), "devices to use, in this order", (), "A,B", device_names, join_devices),
    Flag("n_gpu_layers", ("-ngl", "--gpu-layers", "--n-gpu-layers"), "layers on GPUs, counted from the last",
         (), "N|auto|all", number_or(_AUTO_LAYERS, 0)),
    Flag("tensor_split", ("-ts", "--tensor-split"), "share of the layers of each device",
         (), "N0,N1,...", proportions, join_proportions),
    Flag("split_mode", ("-sm", "--split-mode"), "how a model is split over GPUs",
         (), "|".join(SPLIT_MODES), choice(*SPLIT_MODES)),
    Flag("main_gpu", ("-mg", "--main-gpu"), "the GPU of --split-mode none", (), "INDEX", number(-1, MAX_DEVICES - 1)),
    Flag("n_ctx", ("-c", "--ctx-size"), "context, the sum over slots; 0: the trained length",
         (), "N|auto", number_or(_AUTO_CONTEXT, 0)),
    Flag("n_ctx_per_slot", ("--kv-unified-per-slot",), "context of one conversation",
         (), "N", number(1), launch=False),
    Flag("n_parallel", ("-np", "--parallel"), "slots: conversations at a time",
         (), "N|auto", number_or(_AUTO_SLOTS, 1)),
    Flag("kv_unified", ("-kvu", "--kv-unified"), "one cache that all slots share", ("-no-kvu", "--no-kv-unified")),
    Flag("n_batch", ("-b", "--batch-size"), "logical batch", (), "N", number_or(_UNBOUNDED, 1)),
    Flag("n_ubatch", ("-ub", "--ubatch-size"), "physical batch", (), "N", number_or(_BOUNDED_BY_BATCH, 1)),
    Flag("flash_attn", ("-fa", "--flash-attn"), "flash attention",
         (), "on|off|auto", choice("on", "off", "auto", also=_SWITCH_WORDS)),
    Flag("cache_type_k", ("-ctk", "--cache-type-k"), "type of the K cache", (), _TYPES, choice(*KV_TYPE_NAMES)),
    Flag("cache_type_v", ("-ctv", "--cache-type-v"), "type of the V cache", (), _TYPES, choice(*KV_TYPE_NAMES)),
    Flag("kv_offload", ("-kvo", "--kv-offload"), "caches on the GPUs", ("-nkvo", "--no-kv-offload")),
    Flag("override_tensor", ("-ot", "--override-tensor"), "tensors whose name matches go to this buffer type",
         (), "PATTERN=BUFFER,...", tensor_overrides, join_overrides, gathers=True),
    Flag("cpu_moe", ("-cmoe", "--cpu-moe"), "all experts on the CPU"),
    Flag("n_cpu_moe", ("-ncmoe", "--n-cpu-moe"), "experts of the first N layers on the CPU", (), "N", number(0)),
    Flag("n_cpu_ffn", ("-ncffn", "--n-cpu-ffn"), "dense FFN of the first N layers on the CPU", (), "N", number(0)),
    Flag("swa_full", ("--swa-full",), "sliding-window layers cache the whole context"),
    Flag("load_mode", ("-lm", "--load-mode"), "how weights are read", (), "|".join(LOAD_MODES), choice(*LOAD_MODES)),
    Flag("lazy_mode", ("-lzm", "--lazy-mode"), "huge embeddings read on demand",
         (), "|".join(LAZY_MODES), choice(*LAZY_MODES)),
    Flag("use_host_buffer", (), "no pinned host memory for weights", ("--no-host",)),
    Flag("repack", ("--repack",), "repack CPU weights", ("--no-repack", "-nr")),
    Flag("op_offload", ("--op-offload",), "large batches of CPU weights on the GPU", ("--no-op-offload",)),
    Flag("embeddings", ("--embeddings", "--embedding"), "serve embeddings"),
    Flag("reranking", ("--reranking", "--rerank"), "serve reranking"),
    Flag("pooling", ("--pooling",), "how embeddings are pooled", (), "|".join(POOLING_TYPES), choice(*POOLING_TYPES)),
    Flag("cache_ram_mib", ("-cram", "--cache-ram"), "host memory for cached prompts, MiB", (), "N", number(-1)),
    Flag("ctx_checkpoints", ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints"), "context checkpoints per slot",
         (), "N", number(0)),
    Flag("mmproj", ("-mm", "--mmproj"), "multimodal projector", (), "FILE", str),
    Flag("mmproj_offload", ("--mmproj-offload",), "projector on the GPU", ("--no-mmproj-offload",)),
    Flag("lora", ("--lora",), "LoRA adapters", (), "FILE,...", items, join, gathers=True),
    Flag("model_draft", ("-md", "--model-draft", "--spec-draft-model"), "draft model", (), "FILE", str),
    Flag("n_gpu_layers_draft", ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"),
         "the draft's layers on GPUs", (), "N|auto|all", number_or(_AUTO_LAYERS, 0)),
    Flag("cache_type_k_draft", ("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k"), "the draft's K cache",
         (), _TYPES, choice(*KV_TYPE_NAMES)),
    Flag("cache_type_v_draft", ("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v"), "the draft's V cache",
         (), _TYPES, choice(*KV_TYPE_NAMES)),
    Flag("devices_draft", ("-devd", "--device-draft", "--spec-draft-device"), "the draft's devices",
         (), "A,B", device_names, join_devices),
    Flag("override_tensor_draft", ("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"),
         "as -ot, for the draft", (), "PATTERN=BUFFER,...", tensor_overrides, join_overrides, gathers=True),
    Flag("cpu_moe_draft", ("-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe"), "the draft's experts on the CPU"),
    Flag("n_cpu_moe_draft", ("-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe"),
         "experts of the draft's first N layers on the CPU", (), "N", number(0)),
    Flag("spec_type", ("--spec-type",), "kinds of speculative decoding", (), "TYPE,...", str),
    Flag("spec_draft_n_max", ("--spec-draft-n-max",), "tokens drafted at a time", (), "N", number(0)),
    Flag("override_kv", ("--override-kv",), "metadata overrides",
         (), "KEY=TYPE:VALUE,...", items, join, gathers=True),
    Flag("models", ("-m", "--model"), "the GGUF file; several: will they fit together?", (), "FILE", str, ours=True),
    Flag("versus", ("--versus",), "beside it: llama-server with your own flags, or as its --fit would have it",
         (), '"FLAGS"|fit', str, ours=True),
    Flag("require", ("--require",), "it does not fit unless everything is on devices",
         (), "gpu", choice("gpu"), ours=True),
    Flag("cards", ("--gpu",), "what if: cards of the catalogue, like rtx4090:2", (), "CARD[:COUNT]",
         items, gathers=True, ours=True),
    Flag("machine", ("--machine",), "what if: the machine that `planner devices --json` wrote to this file",
         (), "FILE", str, ours=True),
    Flag("host_memory", ("--host-memory",), "what if: available host memory", (), "SIZE", str, ours=True),
    Flag("no_gpu", ("--no-gpu",), "what if: no GPU at all", ours=True),
    Flag("no_oracle", ("--no-oracle",), "formulas only, never ask llama.cpp", ours=True),
    Flag("json", ("--json",), "print one JSON object", ours=True),
)  # fmt: skip

BY_NAME: Final[Mapping[str, Flag]] = MappingProxyType({name: flag for flag in FLAGS for name in (*flag.on, *flag.off)})
