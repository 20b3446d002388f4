"""One entry per architecture name of llama.cpp (src/llama-arch.cpp).

Cache class from src/llama-model.cpp, ``create_memory``; windows, NextN and output from src/models/*.cpp. A name with no
remark is the common case of ``Architecture``'s defaults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from planner.architectures.rules import Architecture, Cache, Recurrent, Window

if TYPE_CHECKING:
    from collections.abc import Mapping

_NOTHING = r"(?!)"  # no NextN tensor is loaded

# K and V in every layer.
_DENSE: Final = """
    llama deci falcon grok gpt2 gptneox mpt baichuan starcoder refact bloom stablelm qwen qwen2 qwen2moe qwen2vl qwen3
    qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo codeshell orion internlm2 minicpm minicpm3 gemma starcoder2
    xverse command-r dbrx olmo olmoe openelm arctic deepseek deepseek2-ocr chatglm glm4 glm4moe bitnet t5 t5encoder jais
    jais2 nemotron exaone granite granitemoe graniteswitch chameleon plm bailingmoe bailingmoe2 dots1 arcee ernie4_5
    ernie4_5-moe hunyuan-moe hunyuan-dense hunyuan_vl hy_v3 smollm3 seed_oss grovemoe apertus hrm_text minimax-m2 cogvlm
    pangu-embedded mistral3 eagle3 paddleocr llama-embed maincoder talkie nanbeige qwen3tts pockettts
""".split()  # noqa: SIM905  # eighty names read better as text

_SPECIAL: Final[Mapping[str, Architecture]] = {
    "deepseek2": Architecture(latent=True, nextn_loaded=_NOTHING),
    "mistral4": Architecture(latent=True, nextn_loaded=_NOTHING),
    # Windowed attention.
    "afmoe": Architecture(window=Window.IF_SET, window_period=4),
    "cohere2": Architecture(window=Window.ALWAYS, window_period=4),
    "cohere2moe": Architecture(
        window=Window.ALWAYS,
        window_period=4,
        window_dense_first=True,
        nextn_loaded=r"nextn\.(embed_tokens|shared_head_head|shared_head_norm)\.",
    ),
    "dflash": Architecture(window=Window.IF_SET),
    "exaone-moe": Architecture(window=Window.ALWAYS, window_period=4, nextn_loaded=_NOTHING),
    "exaone4": Architecture(window=Window.IF_64_LAYERS, window_period=4, window_tokens=4096, nextn_loaded=_NOTHING),
    "gemma2": Architecture(window=Window.ALWAYS, window_period=2, window_tokens=4096),
    "gemma3": Architecture(window=Window.IF_SET, window_period=6),
    "gemma3n": Architecture(window=Window.ALWAYS, window_period=5, duplicate_first=True),
    "gemma4": Architecture(window=Window.ALWAYS, duplicate_first=True, lazy_embedding=True),
    "gemma4-assistant": Architecture(cache=Cache.BORROWED, window=Window.ALWAYS),
    "gpt-oss": Architecture(window=Window.ALWAYS, window_period=2),
    "granite_swa": Architecture(window=Window.ALWAYS),
    "laguna": Architecture(window=Window.IF_SET, window_period=4, window_dense_first=True),
    "llama4": Architecture(window=Window.UNLESS_ZERO, window_period=4, window_forced=8192),
    "maple": Architecture(window=Window.ALWAYS),
    "mellum": Architecture(window=Window.IF_SET, window_period=4),
    "mimo2": Architecture(window=Window.ALWAYS, nextn_loaded=_NOTHING),
    "muse-glimmer": Architecture(window=Window.ALWAYS, window_period=4),
    "olmo2": Architecture(window=Window.IF_SET, window_period=4),
    "plamo3": Architecture(window=Window.IF_SET, window_period=8),
    "smallthinker": Architecture(window=Window.IF_SET, window_period=4, window_dense_first=True, window_forced=4096),
    "spark2_5": Architecture(window=Window.ALWAYS),
    "step35": Architecture(
        window=Window.ALWAYS,
        nextn_loaded=r"(attn_q_norm|attn_k_norm|attn_gate|ffn_(?!norm)\w+|exp_probs_b"
        r"|nextn\.(embed_tokens|shared_head_\w+))(\.|$)",
    ),
    # Recurrent and hybrid.
    **dict.fromkeys(
        ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"),
        Architecture(cache=Cache.RECURRENT, recurrent=Recurrent.ALL),
    ),
    **dict.fromkeys(
        ("jamba", "plamo2", "granitehybrid", "lfm2moe"),
        Architecture(cache=Cache.HYBRID, recurrent=Recurrent.NO_KV_HEADS),
    ),
    # lfm2's attention layers are all windowed where the file names a window.
    "lfm2": Architecture(cache=Cache.HYBRID, recurrent=Recurrent.NO_KV_HEADS, window=Window.IF_SET, window_period=0),
    "falcon-h1": Architecture(cache=Cache.HYBRID, recurrent=Recurrent.ALL),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"),
        Architecture(cache=Cache.HYBRID, recurrent=Recurrent.NO_KV_HEADS_NO_FF, nextn_loaded=_NOTHING),
    ),
    **dict.fromkeys(
        ("qwen3next", "qwen35", "qwen35moe"),
        Architecture(cache=Cache.HYBRID, recurrent=Recurrent.INTERVAL, trunk_only=True, nextn_loaded=_NOTHING),
    ),
    "minimax-01": Architecture(
        cache=Cache.HYBRID, recurrent=Recurrent.INTERVAL, full_attention_interval=8, trunk_only=True
    ),
    **dict.fromkeys(
        ("kimi-linear", "kimi-k3", "bailingmoe3"),
        Architecture(cache=Cache.HYBRID, recurrent=Recurrent.NO_KV_HEADS, latent=True, nextn_loaded=_NOTHING),
    ),
    "qwen4exp": Architecture(
        cache=Cache.HYBRID_INDEXED, recurrent=Recurrent.INTERVAL, trunk_only=True, lazy_embedding=True
    ),
    "glm5-next": Architecture(
        cache=Cache.HYBRID_INDEXED,
        recurrent=Recurrent.NO_KV_HEADS_ANYWHERE,
        trunk_only=True,
        indexer_types=True,
        latent=True,
        nextn_loaded=_NOTHING,
    ),
    # Sparse attention.
    "deepseek32": Architecture(cache=Cache.SPARSE, latent=True, trunk_only=True, nextn_loaded=r"exp_probs_b\.bias"),
    "glm-dsa": Architecture(
        cache=Cache.SPARSE, latent=True, trunk_only=True, indexer_types=True, nextn_loaded=r"exp_probs_b\.bias"
    ),
    "hy_v4": Architecture(cache=Cache.SPARSE, latent=True, indexer_types=True),
    "dots3note": Architecture(
        cache=Cache.SPARSE,
        latent=True,
        trunk_only=True,
        indexer_types=True,
        window=Window.ALWAYS,
        nextn_loaded=_NOTHING,
    ),
    "minimax-m3": Architecture(cache=Cache.SPARSE_BLOCKS),
    "deepseek4": Architecture(cache=Cache.COMPRESSED, window=Window.ALWAYS, window_period=0, nextn_loaded=_NOTHING),
    # No cache: encoders and diffusion models.
    **dict.fromkeys(
        ("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        Architecture(cache=Cache.NONE, ties_output=False, embeds=True),
    ),
    "modern-bert": Architecture(
        cache=Cache.NONE,
        window=Window.IF_SET,
        window_period=3,
        window_dense_first=True,
        ties_output=False,
        embeds=True,
    ),
    "gemma-embedding": Architecture(cache=Cache.NONE, window=Window.ALWAYS, window_period=6, embeds=True),
    "wavtokenizer-dec": Architecture(cache=Cache.NONE, ties_output=False),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), Architecture(cache=Cache.NONE)),
    # Known by name, but no model of its own.
    "clip": Architecture(cache=Cache.NONE, ties_output=False, loadable=False),
    "gptj": Architecture(cache=Cache.NONE, loadable=False),
}

_REMARKS: Final[Mapping[str, Mapping[str, object]]] = {
    "bitnet": {"ties_output": False},  # multiplies with token_embd where it lies
    "grok": {"flash_attention": False},
    "t5": {"encodes": True},
    "t5encoder": {"encodes": True, "embeds": True},
    "eagle3": {"encodes": True},
    "dflash": {"encodes": True},
    "llama-embed": {"embeds": True},
    "glm4": {"nextn_loaded": _NOTHING},
    "glm4moe": {"nextn_loaded": _NOTHING},
    "bailingmoe2": {"nextn_loaded": _NOTHING},
    "hy_v3": {
        "nextn_loaded": r"(ffn_(?!norm)\w+|exp_probs_b|nextn\.(embed_tokens|shared_head_\w+))(\.|$)",
    },
}

# src/llama-arch.cpp, llm_arch_supports_sm_tensor
_WHOLE_LAYERS_ONLY: Final = """
    grok mpt plamo2 minicpm3 gemma3n mamba mamba2 jamba falcon-h1 olmo2 olmoe deepseek2 deepseek32 hy_v4 dots3note
    glm-dsa bitnet t5 nemotron_h nemotron_h_moe granitehybrid minimax-01 minimax-m2 minimax-m3 mistral4 kimi-linear
    bailingmoe3 kimi-k3 glm5-next qwen3tts qwen4exp
""".split()  # noqa: SIM905  # as above


def _table() -> dict[str, Architecture]:
    table = dict.fromkeys(_DENSE, Architecture()) | dict(_SPECIAL)
    for name, remark in _REMARKS.items():
        table[name] = replace(table[name], **remark)  # type: ignore[arg-type]  # fields of Architecture, by name
    for name in _WHOLE_LAYERS_ONLY:
        table[name] = replace(table[name], splits_tensors=False)
    return table


ARCHITECTURES: Final[Mapping[str, Architecture]] = _table()
