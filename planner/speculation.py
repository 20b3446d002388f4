"""What a request asks for in speculative decoding (common/speculative.cpp)."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from planner.errors import InvalidRequest

if TYPE_CHECKING:
    from planner.model import ModelFacts
    from planner.types.request import PlanRequest

N_MAX: Final = 3  # common/common.h, common_params_speculative_draft
NONE: Final = "none"
SIMPLE: Final = "draft-simple"
OWN_HEAD: Final = "draft-mtp"
# Kinds that look in the text itself, and no model drafts: tokens at a time, and the flag that changes it.
_BY_LOOKUP: Final[dict[str, tuple[int, str | None]]] = {
    "ngram-simple": (48, "--spec-ngram-simple-size-m"),
    "ngram-map-k": (48, "--spec-ngram-map-k-size-m"),
    "ngram-map-k4v": (48, "--spec-ngram-map-k4v-size-m"),
    "ngram-mod": (64, "--spec-ngram-mod-n-max"),
    "ngram-cache": (8, None),
}
_BY_DEFAULT: Final = "--spec-default"  # one kind more, whose numbers are those of its own defaults
_ITS_KIND: Final = "ngram-mod"
LOOKUP_FLAGS: Final = frozenset({_BY_DEFAULT, *(flag for _, flag in _BY_LOOKUP.values() if flag is not None)})
"""Flags that are handed on as they are, and counted here."""

_KINDS: Final = (SIMPLE, "draft-eagle3", OWN_HEAD, "draft-dflash", "draft-dspark", *_BY_LOOKUP)
_WITH_RULE: Final = frozenset({SIMPLE, OWN_HEAD, *_BY_LOOKUP})
# Whose heads are never loaded, or drafted with by caches that have no rule here (src/llama-model.cpp, create_memory).
_HEADS_WITHOUT_RULE: Final = frozenset(
    {
        "bailingmoe2",
        "deepseek4",
        "dots3note",
        "exaone-moe",
        "exaone4",
        "gemma4-assistant",
        "glm4",
        "glm5-next",
        "graniteswitch",
        "nemotron_h",
    }
)
# Whose recurrent states can be rolled back (src/llama-arch.cpp, llm_arch_supports_rs_rollback).
_ROLLS_BACK: Final = frozenset(
    {
        "bailingmoe3",
        "deepseek4",
        "glm5-next",
        "kimi-k3",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen35",
        "qwen35moe",
        "qwen4exp",
    }
)


def types(request: PlanRequest) -> tuple[str, ...]:
    """Return the kinds of speculation that are asked for; none without a flag, or where ``none`` is among them.

    (common/speculative.cpp, ``common_speculative_types_from_names``.) Raises InvalidRequest for a kind that is none.
    """
    by_default = (_ITS_KIND,) if _BY_DEFAULT in request.passthrough else ()
    words = (request.spec_type or NONE).split(",")
    for word in words:
        if word == NONE:
            return by_default
        if word not in _KINDS:
            raise InvalidRequest(f"--spec-type {word}: expected {NONE}, {', '.join(_KINDS)}")
    return (*words, *by_default)


def n_draft(request: PlanRequest) -> int:
    """Return how many tokens are drafted at a time at most, so that the model has to judge that many more.

    (common/speculative.cpp, ``common_speculative_n_max``.)
    """
    return max((_n_max(kind, request) for kind in types(request)), default=0)


def _n_max(kind: str, request: PlanRequest) -> int:
    if kind not in _BY_LOOKUP:
        return n_model_drafts(request)
    default, flag = _BY_LOOKUP[kind]
    words = request.passthrough
    given = [value for name, value in pairwise(words) if name == flag]  # the last counts, as in llama-server
    return int(given[-1]) if given and given[-1].isdigit() else default


def n_model_drafts(request: PlanRequest) -> int:
    """Return how many tokens a draft model or head drafts at a time."""
    return N_MAX if request.spec_draft_n_max is None else request.spec_draft_n_max


def uses_own_head(request: PlanRequest) -> bool:
    """Say whether the model's NextN layers draft, so that they are loaded (common/common.cpp, ``load_mtp``)."""
    return OWN_HEAD in types(request)


def n_rs_seq(model: ModelFacts, request: PlanRequest) -> int:
    """Return how many older states each sequence keeps, to take drafted tokens back (``need_n_rs_seq``)."""
    return n_model_drafts(request) if uses_own_head(request) and model.hparams.architecture in _ROLLS_BACK else 0


def has_draft_head(model: ModelFacts) -> bool:
    """Say whether llama-server takes this draft for a head of its own kind (``common_speculative_types_from_gguf``)."""
    last = f"blk.{model.hparams.n_layer_all - 1}.nextn.eh_proj.weight"
    return model.hparams.architecture == "dflash" or model.tensor(last) is not None


def without_rule(model: ModelFacts, request: PlanRequest) -> str | None:
    """Return what of this request's speculation no rule here covers, or None."""
    if missing := sorted(set(types(request)) - _WITH_RULE):
        return f"speculative decoding by {missing[0]} (--spec-type)"
    draft, architecture = model.draft, model.hparams.architecture
    if request.model_draft and draft is None:
        return "a draft model that was not read (--model-draft)"
    if draft is not None and (uses_own_head(request) or (not request.spec_type and has_draft_head(draft))):
        return f"speculative decoding with a head of its own file, {draft.summary.path}"
    if uses_own_head(request) and architecture in _HEADS_WITHOUT_RULE:
        return f"speculative decoding with the head of {architecture}"
    return None
