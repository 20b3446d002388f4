"""LoRA adapters as files have them: two matrices, A and B, for each tensor of the model that is changed."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.model import Attachment, Tensor
    from planner.types.request import PlanRequest

EMBEDDING: Final = "token_embd.weight"  # A's rows are looked up there, so that A lies the other way round
N_PARTS: Final = 2
SCALED: Final = "--lora-scaled"  # FILE:SCALE,...
UNAPPLIED: Final = "--lora-init-without-apply"  # loaded, and in no graph until a request asks for them
COUNTED_FLAGS: Final = frozenset({SCALED, UNAPPLIED})
"""Flags that are handed on as they are, and counted here."""

_PARTS: Final = frozenset({"lora_a", "lora_b"})
_IGNORED: Final = "_norm.weight"


def files(request: PlanRequest) -> tuple[str, ...]:
    """Return the adapters that a request has loaded, in the order of the launch command."""
    scaled = [value for name, value in pairwise(request.passthrough) if name == SCALED]
    return (*(request.lora or ()), *(item.partition(":")[0] for value in scaled for item in value.split(",")))


def pairs(adapter: Attachment) -> dict[str, tuple[Tensor, ...]]:
    """Return A and B by the name of the tensor that they change; only one of them where the file lacks the other."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for tensor in sorted(adapter.tensors, key=lambda tensor: tensor.name):  # A before B
        base, _, part = tensor.name.rpartition(".")
        if part in _PARTS:
            found[base] = (*found.get(base, ()), tensor)
    return found


def stranger(adapter: Attachment) -> str | None:
    """Return the name of a tensor that belongs to no pair and that llama.cpp does not ignore either, or None."""
    names = (tensor.name for tensor in adapter.tensors)
    return next((name for name in names if name.rpartition(".")[2] not in _PARTS and not name.endswith(_IGNORED)), None)
