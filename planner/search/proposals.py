"""A split that is proposed for a model, and the flags that llama-server needs for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.overrides import UNPIPELINED
from planner.search.learned import Mode
from planner.search.problems import Question, SpillPart, spill_pattern
from planner.search.splits import Split
from planner.types.request import PlanRequest


@dataclass(frozen=True, slots=True)
class Proposal:
    """A solved split, not yet accounted for."""

    mode: Mode
    split: Split
    fastest_s: float  # of all splits: this one may be slower by what counts as equal


def flagged(question: Question, request: PlanRequest, proposal: Proposal) -> PlanRequest:
    """Return the request with the flags that this proposal needs beside devices, layers and shares."""
    spilled = [part for s in proposal.split.segments for part in question.parts[s.spill_start : s.spill_end]]
    if spilled:
        return _spilling(question, request, spilled)
    several = len(proposal.split.segments) > 1
    everything = several and proposal.split.segments[0].start == 0
    if (
        everything
        and proposal.mode is not Mode.PIPELINED
        and question.params.kv_offload
        and not question.params.overrides
    ):
        return replace(request, override_tensor=UNPIPELINED)
    return request


def _spilling(question: Question, request: PlanRequest, spilled: Sequence[SpillPart]) -> PlanRequest:
    """Return the request with the flags that leave these tensors to the host.

    Layers whose parts all stay are named by number; where they are the first, llama.cpp has a flag for that.
    """
    by_slot: dict[int, list[SpillPart]] = {}
    for part in spilled:
        by_slot.setdefault(part.slot, []).append(part)
    counts = Counter(part.slot for part in question.parts)
    whole = [slot for slot, parts in by_slot.items() if len(parts) == counts[slot]]
    names = [part.tensor.name for slot, parts in by_slot.items() if slot not in whole for part in parts]
    overrides = [("|".join(re.escape(name).replace("\\_", "_") for name in names), "CPU")] if names else []
    if whole and whole == [slot for slot in counts if slot <= whole[-1]]:
        count = whole[-1] + 1
        experts = bool(question.model.hparams.n_expert)
        request = replace(request, n_cpu_moe=count) if experts else replace(request, n_cpu_ffn=count)
    elif whole:
        layers = "|".join(map(str, whole))
        overrides.append((rf"blk\.({layers}){spill_pattern(question.model)}", "CPU"))
    return replace(request, override_tensor=tuple(overrides)) if overrides else request
