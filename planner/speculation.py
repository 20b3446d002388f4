"""What a request asks for in speculative decoding (common/speculative.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.model import ModelFacts
    from planner.types import PlanRequest

N_MAX: Final = 3  # common/common.h, common_params_speculative_draft
NONE: Final = "none"
SIMPLE: Final = "draft-simple"
WITH_RULE: Final = frozenset({NONE, SIMPLE})


def types(request: PlanRequest) -> tuple[str, ...]:
    """Return the kinds of speculation that are asked for; none without a flag."""
    return tuple(word for word in (request.spec_type or "").split(",") if word and word != NONE)


def n_draft(request: PlanRequest) -> int:
    """Return how many tokens are drafted at a time, so that the model has to judge that many more."""
    if not types(request):
        return 0
    return N_MAX if request.spec_draft_n_max is None else request.spec_draft_n_max


def has_draft_head(model: ModelFacts) -> bool:
    """Say whether llama-server takes this draft for a head of its own kind (``common_speculative_types_from_gguf``)."""
    hparams = model.hparams
    return hparams.architecture == "dflash" or model.tensor(_last_head(hparams.n_layer_all)) is not None


def _last_head(n_layer_all: int) -> str:
    return f"blk.{n_layer_all - 1}.nextn.eh_proj.weight"


def without_rule(model: ModelFacts, request: PlanRequest) -> str | None:
    """Return what of this request's speculation no rule here covers, or None."""
    if missing := sorted(set(types(request)) - WITH_RULE):
        return f"speculative decoding by {missing[0]} (--spec-type)"
    draft = model.draft
    if request.model_draft and draft is None:
        return "a draft model that was not read (--model-draft)"
    if draft is not None and not request.spec_type and has_draft_head(draft):
        return f"speculative decoding with {draft.summary.path}, which is a draft head"
    return None
