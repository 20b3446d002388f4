"""Asks the installed ``llama-fit-params`` what llama-server's own ``--fit`` would choose.

It takes the memory of the devices that it finds. Here stand-ins take their part, workers on this machine that report
all of its memory, and the margin to be left on each (``-fitt``) makes up the difference; so nothing is taken on any
real device, and imagined ones can be asked about as well.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from planner import flags
from planner.errors import InvalidRequest
from planner.model import ModelFacts
from planner.oracle import WORKER, run_child
from planner.types.machine import LlamaBuild
from planner.types.request import PlanRequest
from planner.units import MIB
from planner.versus import Fitted

TOOL: Final = "llama-fit-params"
TIMEOUT_S: Final = 60.0  # ten probes of 0.2 s are usual, more devices and larger vocabularies take more

# The knobs that the tool takes as llama-server does; it has no unified cache, no projector and no draft model.
_KNOBS: Final = (
    "n_ctx", "n_parallel", "n_batch", "n_ubatch", "n_gpu_layers", "tensor_split", "split_mode", "flash_attn",
    "cache_type_k", "cache_type_v", "kv_offload", "override_tensor", "cpu_moe", "n_cpu_moe", "n_cpu_ffn", "swa_full",
    "use_host_buffer", "repack", "op_offload", "override_kv",
)  # fmt: skip
_BUFFER_ADDRESS: Final = re.compile(r"(=RPC\d+)\[[^\]]*\]")
_STAND_IN: Final = re.compile(r"RPC(\d+)")


def fitted(
    build: LlamaBuild, model: ModelFacts, request: PlanRequest, names: Sequence[str], rooms: Sequence[int]
) -> Fitted | None:
    """Return the request as ``--fit`` changes it for devices of these names with so many bytes each to be filled.

    What the request pins is handed on. None where there is no such tool, no device, or no answer. The tool gives up
    where placement is pinned; a context that it had shortened by then stays so, as in llama-server.
    """
    folder = Path(build.path or "").parent
    if build.path is None or not all((folder / name).exists() for name in (TOOL, WORKER)):
        return None
    if not names or len(rooms) < len(names):
        return None
    stand_in_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # as ggml's CPU backend says
    pinned = PlanRequest(**{knob: getattr(request, knob) for knob in _KNOBS})
    question = {
        "tool": str(folder / TOOL),
        "worker": str(folder / WORKER),
        "model": str(Path(model.paths[0]).absolute()),
        "n_devices": len(names),
        "margins_mib": [-((room - stand_in_bytes) // MIB) for room in rooms],
        "flags": list(flags.write(pinned)),
    }
    answer = run_child("planner.oracle_fit_child", question, TIMEOUT_S)
    if answer is None:
        return None
    if answer["line"] is None:
        n_ctx = answer["n_ctx"]
        kept = request if n_ctx is None else replace(request, n_ctx=n_ctx)
        return Fitted("" if n_ctx is None else f"-c {n_ctx}", kept, gave_up=True)
    try:
        return Fitted(*_read(answer["line"], request, names), gave_up=False)
    except InvalidRequest:
        return None  # another build's words


def _read(line: str, request: PlanRequest, names: Sequence[str]) -> tuple[str, PlanRequest]:
    """Return the tool's flags and the request with them, stand-ins called by the names of what they stand for."""
    words = _BUFFER_ADDRESS.sub(r"\1", line)
    words = _STAND_IN.sub(lambda found: names[int(found[1])], words)
    told = flags.parse(shlex.split(words)).request
    changed = {
        knob: getattr(told, knob)
        for knob in ("n_ctx", "n_gpu_layers", "tensor_split", "override_tensor")
        if getattr(told, knob) is not None
    }
    if "n_gpu_layers" in changed and len(names) == 1:
        changed.setdefault("tensor_split", (1.0,))
    return words, replace(request, **changed)
