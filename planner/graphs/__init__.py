"""The compute graphs that are built here, by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Final

from planner.graph import Graph
from planner.graphs.blocks import Blocks
from planner.graphs.decoder import Decoder
from planner.graphs.shape import HEADER_MOE, Moe, QueryNorm, Residual, Rope, Rows, Settings, Shape, SharedGate, When
from planner.model import MetadataValue

_GELU: Final = ("unary",)
_RELU_SQUARED: Final = ("unary", "sqr")
_FUSED_GATE: Final = ("glu",)
_POST_NORMS: Final = ("post_attention_norm", "post_ffw_norm")
_SCALED_MOE: Final = Moe(uses_scales=True)
_GATED_MOE: Final = Moe(uses_scales=True, shared_gate=SharedGate.SIGMOID)
_BERT: Final = Shape(
    norm="norm", rope=Rope.NONE, learned_positions=True, ffn=_GELU, moe=Moe(normalizes=False, scales=None, gated=False)
)
_GRANITE: Final = Shape(rope=Rope.BY_PATTERN, rope_factors=True, residual_scale=When.IF_SET, logit_scale=When.ALWAYS)
_GEMMA: Final = Shape(embedding_scale=When.ALWAYS, scaled_query=True)

_LFM2: Final = Shape(onto_residual=(True, True), output_norm="token_embd_norm")

SHAPES: Final[Mapping[str, Shape]] = {
    "afmoe": Shape(
        embedding_scale=When.ALWAYS,
        rope=Rope.BUT_EVERY_FOURTH,
        post_norms=_POST_NORMS,
        pins_last_norm=True,
        picks_after_norm=True,
        moe=HEADER_MOE,
    ),
    "arctic": Shape(),
    "grok": Shape(
        embedding_scale=When.ALWAYS,
        capped_scores=True,
        post_norms=("attn_output_norm", "layer_output_norm"),
        pins_last_norm=True,
        logit_scale=When.ALWAYS,
        capped_logits=When.IF_SET,
    ),
    "jina-bert-v2": replace(_BERT, learned_positions=False),
    "jina-bert-v3": replace(_BERT, rope=Rope.ALL, learned_positions=False),
    "kimi-k3": Shape(rows=Rows.ALL),
    "kimi-linear": Shape(moe=Moe(scales=None)),
    "laguna": Shape(moe=HEADER_MOE),
    "llama-embed": Shape(rope_factors=True, moe=_SCALED_MOE),
    "llama4": Shape(
        rope=Rope.BUT_EVERY_FOURTH,
        rope_factors=True,
        query_norm=QueryNorm.PLAIN_AFTER_ROPE,
        temperature=True,
        moe=Moe(normalizes=False, weighs_input=True),
    ),
    "apertus": Shape(rope_factors=True, ffn=_GELU),
    "bitnet": Shape(),
    "chameleon": Shape(),
    "deepseek2-ocr": Shape(moe=HEADER_MOE),
    "rwkv6": Shape(norm="norm", rope=Rope.NONE),
    "rwkv6qwen2": Shape(rope=Rope.NONE),
    "rwkv7": Shape(norm="norm", rope=Rope.NONE),
    "arwkv7": Shape(rope=Rope.NONE),
    "step35": Shape(moe=Moe(normalizes=None, scales=None, limited=True), rows=Rows.BEFORE_NORM),
    "openelm": Shape(onto_residual=(True, False)),
    "spark2_5": Shape(),
    "arcee": Shape(rope_factors=True, ffn=_RELU_SQUARED),
    "baichuan": Shape(rope=Rope.IF_32_LAYERS),
    "bailingmoe": Shape(rope_factors=True, moe=HEADER_MOE),
    "bailingmoe2": Shape(moe=HEADER_MOE),
    "bailingmoe3": Shape(
        four_positions=When.IF_SET, moe=Moe(normalizes=None, scales=None, limited=True), rows=Rows.AFTER_NORM
    ),
    "bert": _BERT,
    "bloom": Shape(norm="norm", rope=Rope.NONE, embedding_norm=True, ffn=_GELU),
    "chatglm": Shape(ffn=_FUSED_GATE),
    "codeshell": Shape(norm="norm", ffn=_GELU),
    "cogvlm": Shape(plain_products=True, rows=Rows.ALL),
    "cohere2": Shape(
        norm="norm",
        rope=Rope.WINDOWED,
        rope_factors=True,
        residual=Residual.INPUT_FIRST,
        ffn_norm=None,
        logit_scale=When.IF_SET,
    ),
    "cohere2moe": Shape(
        rope_factors=True,
        residual=Residual.INPUT_FIRST,
        ffn_norm=None,
        moe=Moe(normalizes=None, scales=None, uses_scales=True),
        rows=Rows.AFTER_NORM,
        logit_scale=When.IF_SET,
    ),
    "command-r": Shape(
        norm="norm",
        residual=Residual.INPUT_FIRST,
        ffn_norm=None,
        logit_scale=When.IF_SET,
    ),
    "dbrx": Shape(norm="norm", clamps=True, ffn_norm="attn_output_norm"),
    "deci": Shape(rope_factors=True),
    "deepseek": Shape(rope_factors=True, moe=Moe(normalizes=False, scales=None)),
    "deepseek2": Shape(moe=HEADER_MOE),
    "deepseek32": Shape(moe=HEADER_MOE, carries_more=True),
    "deepseek4": Shape(moe=HEADER_MOE, rows=Rows.ALL, carries_more=True),
    "dots1": Shape(moe=HEADER_MOE),
    "dots3note": Shape(moe=HEADER_MOE, carries_more=True),
    "dream": Shape(),
    "ernie4_5": Shape(),
    "ernie4_5-moe": Shape(),
    "eurobert": Shape(),
    "exaone": Shape(rope_factors=True),
    "exaone-moe": Shape(rope=Rope.WINDOWED, rope_factors=True, moe=HEADER_MOE),
    "exaone4": Shape(
        attention_norm=False, rope=Rope.WINDOWED, rope_factors=True, post_norms=_POST_NORMS, ffn_norm=None
    ),
    "falcon-h1": Shape(),
    "falcon": Shape(norm="norm", residual=Residual.ATTENTION_FIRST, ffn_norm=None, ffn=_GELU),
    "gemma": _GEMMA,
    "gemma-embedding": Shape(embedding_scale=When.ALWAYS, scaled_query=True, post_norms=_POST_NORMS),
    "gemma2": Shape(
        embedding_scale=When.ALWAYS,
        scaled_query=True,
        post_norms=_POST_NORMS,
        capped_scores=True,
        capped_logits=When.ALWAYS,
    ),
    "gemma3": Shape(embedding_scale=When.ALWAYS, scaled_query=True, post_norms=_POST_NORMS, capped_logits=When.IF_SET),
    "gemma3n": Shape(carries_more=True, embedding_scale=When.ALWAYS, capped_logits=When.ALWAYS),
    "gemma4": Shape(carries_more=True, embedding_scale=When.ALWAYS, rows=Rows.AFTER_NORM, capped_logits=When.IF_SET),
    "glm-dsa": Shape(moe=HEADER_MOE, carries_more=True),
    "glm4": Shape(four_positions=When.IF_SET, pins_last_norm=True, post_norms=_POST_NORMS, ffn=_FUSED_GATE),
    "glm4moe": Shape(four_positions=When.IF_SET, ffn_norm="post_attention_norm", moe=HEADER_MOE),
    "glm5-next": Shape(moe=HEADER_MOE, rows=Rows.ALL, carries_more=True),
    "gpt-oss": Shape(
        sinks=True,
        ffn_norm="post_attention_norm",
        moe=Moe(normalizes=False, softmax_after=True),
        rows=Rows.BEFORE_NORM,
    ),
    "gpt2": Shape(norm="norm", rope=Rope.NONE, learned_positions=True, ffn=_GELU),
    "gptneox": Shape(norm="norm", ffn=_GELU),
    "granite": _GRANITE,
    "granitehybrid": Shape(
        rope=Rope.BY_PATTERN, rope_factors=True, residual_scale=When.IF_SET, logit_scale=When.IF_SET
    ),
    "granitemoe": _GRANITE,
    "graniteswitch": Shape(rope_factors=True, residual_scale=When.IF_SET, logit_scale=When.ALWAYS),
    "granite_swa": Shape(
        rope=Rope.BY_PATTERN,
        rope_factors=True,
        sinks=True,
        residual_scale=When.IF_SET,
        logit_scale=When.ALWAYS,
    ),
    "grovemoe": Shape(),
    "hrm_text": Shape(carries_more=True),
    "hunyuan-dense": Shape(rope_factors=True, query_norm=QueryNorm.AFTER_ROPE),
    "hunyuan-moe": Shape(rope_factors=True, query_norm=QueryNorm.AFTER_ROPE),
    "hunyuan_vl": Shape(four_positions=When.IF_SET, rope_factors=True, query_norm=QueryNorm.AFTER_ROPE),
    "hy_v3": Shape(rope_factors=True, moe=Moe(normalizes=None, scales=None, uses_scales=True), rows=Rows.AFTER_NORM),
    "hy_v4": Shape(moe=HEADER_MOE, rows=Rows.ALL, carries_more=True),
    "internlm2": Shape(),
    "jamba": Shape(rope=Rope.NONE, onto_residual=(True, True), moe=Moe(normalizes=False)),
    "jais": Shape(norm="norm", rope=Rope.NONE),
    "jais2": Shape(norm="norm", ffn=_RELU_SQUARED),
    "lfm2": _LFM2,
    "lfm2moe": _LFM2,
    "llada": Shape(),
    "llada-moe": Shape(moe=Moe(normalizes=False)),
    "llama": Shape(rope_factors=True, moe=_SCALED_MOE),
    "maincoder": Shape(query_norm=QueryNorm.AFTER_ROPE),
    "mamba": Shape(),
    "mamba2": Shape(),
    "maple": Shape(rope=Rope.WINDOWED),
    "mellum": Shape(moe=_SCALED_MOE),
    "mimo2": Shape(sinks=True, plain_products=True, value_scale=When.IF_SET, moe=Moe()),
    "minicpm": Shape(
        embedding_scale=When.ALWAYS,
        rope_factors=True,
        residual_scale=When.ALWAYS,
        logit_scale=When.ALWAYS,
    ),
    "minicpm3": Shape(embedding_scale=When.ALWAYS, rope_factors=True, residual_scale=When.ALWAYS),
    "minimax-01": Shape(),
    "minimax-m2": Shape(query_norm=QueryNorm.ROWS),
    "minimax-m3": Shape(moe=HEADER_MOE, carries_more=True),
    "mistral3": Shape(rope_factors=True, moe=_SCALED_MOE, temperature=True),
    "mistral4": Shape(moe=HEADER_MOE, temperature=True),
    "modern-bert": Shape(norm="norm", embedding_norm=True, ffn=_FUSED_GATE),
    "mpt": Shape(
        query_norm=QueryNorm.NONE, norm="norm", rope=Rope.NONE, learned_positions=True, clamps=True, ffn=_GELU
    ),
    "muse-glimmer": Shape(rope=Rope.WINDOWED, logit_scale=When.ALWAYS, capped_logits=When.IF_SET),
    "nanbeige": Shape(rope_factors=True),
    "nemotron_h": Shape(rope=Rope.NONE, ffn=_RELU_SQUARED, rows=Rows.AFTER_NORM),
    "nemotron_h_moe": Shape(rope=Rope.NONE, ffn=_RELU_SQUARED, moe=None, rows=Rows.AFTER_NORM),
    "nemotron": Shape(norm="norm", ffn=_RELU_SQUARED),
    "neo-bert": Shape(output_norm="enc.output_norm", ffn=_FUSED_GATE),
    "nomic-bert": replace(_BERT, rope=Rope.ALL, learned_positions=False, ffn=()),
    "nomic-bert-moe": replace(_BERT, rope=Rope.ALL, learned_positions=False),
    "olmo": Shape(norm="norm", clamps=True),
    "olmo2": Shape(attention_norm=False, query_norm=QueryNorm.ROWS, post_norms=_POST_NORMS, ffn_norm=None),
    "olmoe": Shape(query_norm=QueryNorm.ROWS, moe=Moe(normalizes=False)),
    "orion": Shape(norm="norm"),
    "paddleocr": Shape(four_positions=When.ALWAYS),
    "pangu-embedded": Shape(),
    "phi2": Shape(norm="norm", scaled_query=True, residual=Residual.FEED_FORWARD_LAST, ffn_norm=None, ffn=_GELU),
    "phi3": Shape(onto_residual=(False, True), rope_factors=True, scaled_query=True, ffn=_FUSED_GATE),
    "phimoe": Shape(onto_residual=(False, True), rope_factors=True, scaled_query=True),
    "plamo": Shape(residual=Residual.ATTENTION_FIRST, ffn_norm=None),
    "plamo2": Shape(plain_products=True, pins_last_norm=True, post_norms=_POST_NORMS, ffn=_FUSED_GATE),
    "plamo3": Shape(plain_products=True, pins_last_norm=True, post_norms=_POST_NORMS, ffn=_FUSED_GATE),
    "plm": Shape(ffn=_RELU_SQUARED),
    "pockettts": Shape(norm="norm", ffn=_GELU),
    "qwen": Shape(),
    "qwen2": Shape(),
    "qwen2moe": Shape(moe=Moe(normalizes=False, shared_gate=SharedGate.RATIO)),
    "qwen2vl": Shape(four_positions=When.ALWAYS),
    "qwen3": Shape(),
    "qwen35": Shape(four_positions=When.ALWAYS, ffn_norm="post_attention_norm", rows=Rows.AFTER_NORM),
    "qwen35moe": Shape(
        four_positions=When.ALWAYS, ffn_norm="post_attention_norm", moe=_GATED_MOE, rows=Rows.AFTER_NORM
    ),
    "qwen3next": Shape(ffn_norm="post_attention_norm", moe=_GATED_MOE, rows=Rows.AFTER_NORM),
    "qwen4exp": Shape(
        four_positions=When.ALWAYS,
        moe=Moe(scales=None, uses_scales=True, shared_gate=SharedGate.SIGMOID),
        carries_more=True,
    ),
    "qwen3moe": Shape(moe=_SCALED_MOE),
    "qwen3tts": Shape(four_positions=When.ALWAYS),
    "qwen3vl": Shape(four_positions=When.ALWAYS),
    "qwen3vlmoe": Shape(four_positions=When.ALWAYS),
    "refact": Shape(rope=Rope.NONE),
    "rnd1": Shape(),
    "seed_oss": Shape(ffn_norm="post_attention_norm"),
    "smallthinker": Shape(),
    "smollm3": Shape(rope=Rope.BUT_EVERY_FOURTH),
    "stablelm": Shape(norm="norm"),
    "starcoder": Shape(norm="norm", rope=Rope.NONE, learned_positions=True, ffn=_GELU),
    "starcoder2": Shape(norm="norm", ffn=_GELU),
    "t5": Shape(rope=Rope.NONE, output_norm="dec.output_norm", carries_more=True),
    "t5encoder": Shape(rope=Rope.NONE, output_norm="enc.output_norm", carries_more=True),
    "talkie": Shape(carries_more=True, query_norm=QueryNorm.AFTER_ROPE, logit_scale=When.ALWAYS),
    "xverse": Shape(),
}

# Where the builders are that differ from Decoder, by module and class: a family is imported when one of its models is
# met, since `planner explain` has a fifth of a second for everything.
_BUILDERS: Final[Mapping[str, str]] = {
    "afmoe": "variants.GatedAttentionDecoder",
    "arctic": "variants.ArcticDecoder",
    "bailingmoe3": "kimi.SafeDeltaAttentionDecoder",
    "bert": "uncached.BertEncoder",
    "bitnet": "variants.BitnetDecoder",
    "chameleon": "variants.ChameleonDecoder",
    "cohere2moe": "mixtures.Cohere2MoeDecoder",
    "deepseek2": "latent.LatentDecoder",
    "deepseek32": "sparse.SparseDecoder",
    "deepseek4": "compressed.CompressedDecoder",
    "dots3note": "sparse.WindowedSparseDecoder",
    "dream": "uncached.UncachedDecoder",
    "eurobert": "uncached.Encoder",
    "falcon-h1": "state_space.FalconH1Decoder",
    "gemma-embedding": "uncached.Encoder",
    "gemma3n": "gemma.Gemma3nDecoder",
    "gemma4": "gemma.Gemma4Decoder",
    "glm-dsa": "sparse.SparseDecoder",
    "glm5-next": "pool_sparse.PoolSparseDecoder",
    "granitehybrid": "state_space.Mamba2Decoder",
    "graniteswitch": "switched.SwitchedDecoder",
    "grok": "variants.GrokDecoder",
    "grovemoe": "mixtures.GroveMoeDecoder",
    "hrm_text": "variants.HrmTextDecoder",
    "hy_v4": "hyper.HyperSparseDecoder",
    "jamba": "state_space.MambaDecoder",
    "jina-bert-v2": "uncached.GatedBertEncoder",
    "jina-bert-v3": "uncached.BertEncoder",
    "kimi-k3": "kimi.ResidualAttentionDecoder",
    "kimi-linear": "kimi.DeltaAttentionDecoder",
    "laguna": "variants.GatedAttentionDecoder",
    "lfm2": "state_space.ShortConvolutionDecoder",
    "lfm2moe": "state_space.ShortConvolutionDecoder",
    "llada": "uncached.UncachedDecoder",
    "llada-moe": "uncached.UncachedDecoder",
    "llama-embed": "uncached.Encoder",
    "mamba": "state_space.PureMambaDecoder",
    "mamba2": "state_space.PureMamba2Decoder",
    "minicpm3": "latent.MiniCpm3Decoder",
    "minimax-01": "lightning.LightningDecoder",
    "minimax-m3": "block_sparse.BlockSparseDecoder",
    "mistral4": "latent.LatentDecoder",
    "modern-bert": "uncached.ModernBertEncoder",
    "muse-glimmer": "variants.MuseGlimmerDecoder",
    "nemotron_h": "state_space.NemotronDecoder",
    "nemotron_h_moe": "state_space.NemotronDecoder",
    "neo-bert": "uncached.Encoder",
    "nomic-bert": "uncached.GatedBertEncoder",
    "nomic-bert-moe": "uncached.BertEncoder",
    "openelm": "variants.OpenElmDecoder",
    "plamo2": "state_space.Plamo2Decoder",
    "plm": "latent.ExpandedLatentDecoder",
    "qwen35": "delta_net.DeltaNetDecoder",
    "qwen35moe": "delta_net.DeltaNetDecoder",
    "qwen3next": "delta_net.SpreadDeltaNetDecoder",
    "qwen4exp": "gram_sparse.GramSparseDecoder",
    "refact": "variants.RefactDecoder",
    "rnd1": "uncached.UncachedDecoder",
    "arwkv7": "rwkv7.Rwkv7QwenDecoder",
    "rwkv6": "rwkv.Rwkv6Decoder",
    "rwkv6qwen2": "rwkv.Rwkv6QwenDecoder",
    "rwkv7": "rwkv7.Rwkv7Decoder",
    "smallthinker": "mixtures.SmallThinkerDecoder",
    "spark2_5": "variants.GatedAttentionDecoder",
    "step35": "variants.Step35Decoder",
    "t5": "t5.T5Decoder",
    "t5encoder": "t5.T5Encoder",
    "talkie": "variants.TalkieDecoder",
}


# Those of them whose layers hand on nothing but the residual, and differ by what is in the header and the file alone.
_ALIKE: Final = frozenset({"latent.LatentDecoder", "delta_net.DeltaNetDecoder", "delta_net.SpreadDeltaNetDecoder"})


def repeats_layers(architecture: str) -> bool:
    """Say whether layers of this architecture are alike where header and tensors are, so that some can be left out."""
    shape = SHAPES[architecture]
    alike = architecture not in _BUILDERS or _BUILDERS[architecture] in _ALIKE
    return alike and not shape.carries_more and shape.rope is not Rope.BUT_EVERY_FOURTH


def build_graph(blocks: Blocks, metadata: Mapping[str, MetadataValue]) -> Graph:
    """Return the graph of one batch. Raises KeyError for an architecture or a file whose graph is not built here."""
    architecture = blocks.hparams.architecture
    return builder(architecture)(blocks, Settings(architecture, metadata), SHAPES[architecture]).build()


def builder(architecture: str) -> type[Decoder]:
    """Return the class that builds the graphs of this architecture."""
    if architecture not in _BUILDERS:
        return Decoder
    module, name = _BUILDERS[architecture].split(".")
    found: type[Decoder] = getattr(import_module(f"planner.graphs.{module}"), name)
    return found
