"""What is asked of the planner for one model: what its file is, what the operator set for it, what a client asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from config.model_settings import ModelSettings
from planner import flags
from planner.errors import InvalidRequest
from planner.llama_flags import LEFT_OUT
from planner.types import LoadOptions, PlanRequest, Role
from supervisor.models.catalogue import ModelEntry

DRAFT_BY_ITSELF: Final = "draft-mtp"  # llama-server's --spec-type for a model's own prediction layers
AS_SET: Final = LoadOptions()
# What a client gets at least of a model with eyes, as in Ollama: most encoders make 256 to 1,120 tokens of an image. A
# shorter context leaves no room to speak of it, and who sends one for every model does not mean that.
MIN_SEEING_CTX: Final = 2048
# The planner's own words for a machine that is not there have no place in the settings of one that is.
_NOT_FLAGS: Final = frozenset({"models", "what_if", "cards", "machine", "host_memory", "no_gpu", "versus", "require"})


def flags_of(settings: ModelSettings) -> PlanRequest:
    """Return what the model's own llama-server flags ask for. Raises InvalidRequest, which names the flag."""
    for word in settings.flags:
        if (left_out := LEFT_OUT.get(word)) is not None:
            raise InvalidRequest(f"{word} is not the model's to set: {left_out[1]}")
    line = flags.parse(settings.flags)
    unset = flags.Options()
    for each in _NOT_FLAGS:
        if getattr(line.options, each) != getattr(unset, each):
            raise InvalidRequest(f"{' '.join(settings.flags)}: only llama-server's own flags, and no model, stand here")
    return line.request


def request_of(
    entry: ModelEntry, settings: ModelSettings, load: LoadOptions = AS_SET, *, draft: str | None = None
) -> PlanRequest:
    """Return the request for this model. A client's options win over the model's settings, those over its flags.

    ``draft`` is the path of the draft model that the settings name. Raises InvalidRequest.
    """
    projector = entry.mmproj if settings.projector is None else settings.projector
    least = MIN_SEEING_CTX if projector else 0
    asked: dict[str, Any] = {
        "role": entry.role if settings.role is None else Role(settings.role),
        "mmproj": projector or None,
        "lora": entry.adapters or None,
        "n_ctx_per_slot": settings.context if load.n_ctx is None else max(load.n_ctx, least),
        "n_parallel": settings.slots,
        "cache_type_k": settings.kv_cache_type,
        "cache_type_v": settings.kv_cache_type,
        "flash_attn": settings.flash_attention,
        "cache_ram_mib": settings.cache_ram,
        "devices": settings.devices,
        "model_draft": draft,
        "spec_type": DRAFT_BY_ITSELF if settings.mtp else None,
        "n_gpu_layers": load.n_gpu_layers,
        # To a client it is the GPU that the model is to lie on; to llama.cpp it is that only where nothing is split.
        "split_mode": None if load.main_gpu is None else "none",
        "main_gpu": load.main_gpu,
        "n_batch": load.n_batch,
        "load_mode": None if load.use_mmap is None else "mmap" if load.use_mmap else "none",
    }
    by_flags = flags_of(settings)
    if asked["n_ctx_per_slot"] is not None:
        by_flags = replace(by_flags, n_ctx=None)
    return replace(by_flags, **{name: value for name, value in asked.items() if value is not None})
