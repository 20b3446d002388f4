"""What distinguishes one family of decoders from another, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from planner.model import MetadataValue

MOST_REPEATED = 1024  # streams, steps, heads taken apart: what a graph is built of one by one


class When(StrEnum):
    """Whether an operation is there: by the architecture, or where the header sets its factor."""

    NEVER = "never"
    ALWAYS = "always"
    IF_SET = "if the header sets it"


class Rope(StrEnum):
    """Which layers turn positions in."""

    ALL = "all"
    NONE = "none"
    WINDOWED = "windowed layers, or all where none is windowed"
    BUT_EVERY_FOURTH = "all but every fourth"
    BY_PATTERN = "as attention.rope_pattern says"
    IF_32_LAYERS = "all in a model of 32 layers, else none"


class QueryNorm(StrEnum):
    """Where query and key are normalized, in files that have weights for it."""

    NONE = "not at all; files that have weights for it are not built here"
    HEADS = "each head, before rope"
    ROWS = "the whole row, before it is cut into heads"
    AFTER_ROPE = "each head, after rope"
    PLAIN_AFTER_ROPE = "each head, after rope and without weights, unless there are 128 experts"


class Residual(StrEnum):
    """How attention and feed-forward part are added to what came in."""

    SEQUENTIAL = "one after the other"
    INPUT_FIRST = "(feed-forward + input) + attention"
    ATTENTION_FIRST = "(feed-forward + attention) + input"
    FEED_FORWARD_LAST = "(attention + feed-forward) + input"


class Rows(StrEnum):
    """Where the rows that yield outputs are picked."""

    IN_LAST_LAYER = "after the last layer's attention"
    BEFORE_NORM = "before the output norm"
    AFTER_NORM = "after the output norm"
    ALL = "nowhere: every token yields outputs"


class SharedGate(StrEnum):
    """How the shared expert's output is weighed."""

    NONE = "not at all"
    RATIO = "silu(score) / score"
    SIGMOID = "sigmoid(score)"


@dataclass(frozen=True, slots=True)
class Moe:
    """How a block chooses and weighs its experts. None: as the header says (expert_weights_norm, _scale)."""

    normalizes: bool | None = True
    scales: bool | None = False
    softmax_after: bool = False  # softmax over the chosen experts' weights only
    gated: bool = True
    weighs_input: bool = False  # the weights are applied before the experts; the plain scores choose
    uses_scales: bool = False  # experts' scales, in files that have them
    shared_gate: SharedGate = SharedGate.NONE
    limited: bool = False  # gated activations are clamped on both sides, where the header says so


HEADER_MOE: Final = Moe(normalizes=None, scales=None)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a decoder's graph does; the defaults are llama's (src/models/llama.cpp)."""

    norm: str = "rms_norm"
    embedding_scale: When = When.IF_SET
    embedding_norm: bool = False
    learned_positions: bool = False  # where the file has them
    four_positions: When = When.NEVER  # per token, for rope in several dimensions
    attention_norm: bool = True
    rope: Rope = Rope.ALL
    rope_factors: bool = False
    query_norm: QueryNorm = QueryNorm.HEADS
    scaled_query: bool = False
    plain_products: bool = False  # query, key and value without scales and biases, whatever the file has
    value_scale: When = When.NEVER  # attention's output
    clamps: bool = False  # query, key and value, where the header says so
    temperature: bool = False  # the query is scaled by position, where the header says so
    sinks: bool = False
    capped_scores: bool = False
    post_norms: tuple[str, str] | None = None  # after attention and after the feed-forward part
    picks_after_norm: bool = False  # the last layer's rows, after the norm behind attention
    pins_last_norm: bool = False  # the norm after the feed-forward part knows its layer
    residual: Residual = Residual.SEQUENTIAL
    residual_scale: When = When.NEVER
    onto_residual: tuple[bool, bool] = (False, False)  # the residual is a sum's first operand, whose memory is reused
    output_norm: str = "output_norm"
    ffn_norm: str | None = "ffn_norm"
    ffn: tuple[str, ...] = ()  # activations between up and down; none: gate and up in parallel
    moe: Moe | None = field(default_factory=Moe)  # None: blocks with experts are not built here
    rows: Rows = Rows.IN_LAST_LAYER
    logit_scale: When = When.NEVER
    capped_logits: When = When.NEVER
    carries_more: bool = False  # than the residual, from layer to layer: no closed form bounds it


class Settings:
    """A header's values, by their name within the architecture."""

    def __init__(self, architecture: str, metadata: Mapping[str, MetadataValue]) -> None:
        self._architecture = architecture
        self._metadata = metadata

    def get(self, name: str) -> MetadataValue | None:
        """Return a value, or None."""
        return self._metadata.get(f"{self._architecture}.{name}")

    def number(self, name: str) -> float:
        """Return a number, 0 where the header has none."""
        value = self.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    def count(self, name: str) -> int:
        """Return how often something is repeated in a graph. Raises KeyError for what no file of worth asks for."""
        value = int(self.number(name))
        if not 0 <= value <= MOST_REPEATED:
            raise KeyError(name)
        return value

    def of_layer(self, name: str, il: int) -> float:
        """Return a layer's number, which may be that of all, 0 where the header has none."""
        value = self.get(name)
        if isinstance(value, tuple):
            value = value[il]
        return float(value) if isinstance(value, int | float) else 0.0

    def has(self, when: When, name: str) -> bool:
        """Say whether an operation is there whose factor is this value."""
        return when is When.ALWAYS or (when is When.IF_SET and self.number(name) != 0)
