"""Tensor overrides: which weights ``-ot``, ``-cmoe``, ``-ncmoe`` and ``-ncffn`` send to which buffer type.

llama.cpp keeps one list in the order of its command line, and the first pattern that matches a tensor's name wins
(src/llama-model-loader.cpp, ``create_tensor``). The three flags that know the CPU only are alike in every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.types.request import PlanRequest

Override = tuple[str, str]  # a regular expression and the name of a buffer type

CPU: Final = "CPU"
MAX_LAYERS: Final = 512  # LLAMA_MAX_LAYERS (src/llama-hparams.h)

# common/common.h, LLM_FFN_EXPS_REGEX and LLM_FFN_DENSE_REGEX
EXPERTS: Final = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
FFN: Final = r"\.ffn_(up|down|gate)\."

# A pattern that no tensor's name matches: any override at all makes llama.cpp keep one copy of a split graph's inputs
# instead of four (src/llama-context.cpp, ``pipeline_parallel``).
UNPIPELINED: Final[tuple[Override, ...]] = (("^unpipelined$", CPU),)


def to_cpu(
    *, cpu_moe: bool | None, n_cpu_moe: int | None, n_cpu_ffn: int | None, n_layer: int = MAX_LAYERS
) -> tuple[Override, ...]:
    """Return what these flags add to the list, for a model of so many layers: one pattern for each flag."""
    pairs = [(EXPERTS, CPU)] if cpu_moe else []
    for count, pattern in ((n_cpu_moe, EXPERTS), (n_cpu_ffn, FFN)):
        if layers := min(count or 0, n_layer):
            pairs.append((rf"blk\.({'|'.join(map(str, range(layers)))}){pattern}", CPU))
    return tuple(pairs)


def ahead(to_cpu: Sequence[Override], own: Sequence[Override]) -> tuple[Override, ...]:
    """Return the list for patterns that come after flags for the CPU; where the order cannot matter, it is ``own``."""
    matters = any(buffer != CPU for _, buffer in own)
    return (*to_cpu, *own) if matters else tuple(own)


def spilled(request: PlanRequest) -> str:
    """Say in a few words which weights of layers on devices stay on the CPU by the flags; empty where none does."""
    if request.cpu_moe:
        return "all experts on the CPU"
    if request.n_cpu_moe:
        return f"experts of {request.n_cpu_moe} layers on the CPU"
    if request.n_cpu_ffn:
        return f"FFN of {request.n_cpu_ffn} layers on the CPU"
    to_cpu = any(buffer == CPU for _, buffer in request.override_tensor or ())
    return "parts of layers on the CPU" if to_cpu and request.override_tensor != UNPIPELINED else ""
