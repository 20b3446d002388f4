"""What would have to change for a model to fit: single changes of the request, each really tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

from planner.types import HOST, NearestChange, NoFit, Plan, PlanOutcome, PlanRequest

SMALL_UBATCH: Final = 128  # a quarter of the default: compute buffers shrink about as much, prompts get slower


class Change(NamedTuple):
    """A change of the request: whether it is one here, how it is written as flags, and the fields that it sets."""

    possible: bool
    flags: str
    fields: dict[str, Any]


def nearest(
    request: PlanRequest, refused: NoFit, answer: Callable[[PlanRequest], PlanOutcome]
) -> tuple[NearestChange, ...]:
    """Return each change that could free memory where it is lacking, the gentlest first, and whether it is enough."""
    tried = []
    for change in _changes(request, refused):
        if not change.possible:
            continue
        outcome = answer(replace(request, **change.fields))
        fits = isinstance(outcome, Plan) and not outcome.fit_by_llama
        # How long a context fits is known only now.
        n_ctx = outcome.request.n_ctx if fits and "n_ctx" in change.fields else None
        name = change.flags if n_ctx is None else f"--ctx-size {n_ctx}"
        tried.append(NearestChange(name, fits))
    return tuple(tried)


def _changes(request: PlanRequest, refused: NoFit) -> tuple[Change, ...]:
    knob = refused.request  # with every knob as it was tried
    host_is_short = any(cause.device == HOST for cause in refused.causes)
    no_gpu = {"devices": (), "n_gpu_layers": None, "tensor_split": None, "main_gpu": None}
    return (
        Change(request.n_gpu_layers not in {None, 0}, "-ngl auto", {"n_gpu_layers": None}),
        Change(request.tensor_split is not None, "no --tensor-split", {"tensor_split": None}),
        Change(request.n_ctx != "auto", "--ctx-size auto", {"n_ctx": "auto", "n_ctx_per_slot": None}),
        Change(knob.cache_type_k == "f16", "-ctk q8_0 -ctv q8_0", {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
        Change((knob.n_parallel or 1) > 1, "--parallel 1", {"n_parallel": 1}),
        Change((knob.n_ubatch or 0) > SMALL_UBATCH, f"--ubatch-size {SMALL_UBATCH}", {"n_ubatch": SMALL_UBATCH}),
        Change(bool(knob.cache_ram_mib) and host_is_short, "--cache-ram 0", {"cache_ram_mib": 0}),
        Change(bool(knob.devices) and not host_is_short, "--no-gpu", no_gpu),
    )
