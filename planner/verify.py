"""The formulas held against llama.cpp itself: for one placement, both sides' bytes per device and component.

llama.cpp's side is a size-only load (``planner.oracle``), which takes no memory on any device. What is loaded beside
the model (adapters, a projector, a draft) is left out on both sides, and so are weights that stay on the host where a
size-only load does not count them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from planner import adapters, companions
from planner.accounting import DeviceBytes, account
from planner.build import PINNED_COMMIT, is_pinned
from planner.context import context_params
from planner.explain import headline
from planner.model import ModelFacts
from planner.search import placement as search
from planner.search.candidates import Oracle
from planner.text import aligned, columns
from planner.types.machine import LlamaBuild, Machine
from planner.types.plan import NoFit, Plan, Refused
from planner.types.request import PlanRequest, Policy
from planner.types.usage import Figure, Source
from planner.units import MIB

SCHEMA: Final = 1
EXACT_TOLERANCE_BYTES: Final = 0  # of exact and simulated figures
# An estimated figure is a bound: never below llama.cpp's, and above it by no more than the larger of these.
ESTIMATE_ABOVE_SHARE: Final = 0.25
ESTIMATE_ABOVE_BYTES: Final = 8 * MIB

_COMPONENTS: Final = ("model", "context", "compute")
_HEADINGS: Final = ("device", "component", "source", "planned", "llama.cpp", "difference")
_BESIDE: Final = {"lora": "--lora", "mmproj": "--mmproj", "model_draft": "--model-draft", "spec_type": "--spec-type"}


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both sides. Not ``comparable``: one side does not know it, or only a stand-in was asked."""

    device: str
    component: str
    planned: Figure
    told: Figure

    @property
    def comparable(self) -> bool:
        """Say whether both sides know the figure."""
        return self.planned.bytes is not None and self.told.source is Source.ORACLE

    @property
    def difference_bytes(self) -> int | None:
        """Return how much more is planned than llama.cpp says."""
        if self.planned.bytes is None or self.told.bytes is None:
            return None
        return self.planned.bytes - self.told.bytes

    @property
    def agrees(self) -> bool:
        """Say whether the difference is within the tolerance of the figure's source, where there is one at all."""
        difference = self.difference_bytes
        if not self.comparable or difference is None:
            return True
        if self.planned.source is not Source.ESTIMATED:
            return abs(difference) <= EXACT_TOLERANCE_BYTES
        return 0 <= difference <= max(ESTIMATE_ABOVE_SHARE * (self.told.bytes or 0), ESTIMATE_ABOVE_BYTES)


@dataclass(frozen=True, slots=True)
class Verification:
    """One model's comparison. ``problem`` says why there is none; then ``figures`` is empty.

    ``failed``: a comparison was to be expected, but llama.cpp gave no answer.
    """

    path: str
    figures: tuple[Compared, ...] = ()
    problem: str | None = None
    failed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[Compared, ...]:
        """Return the figures that are further apart than is tolerated."""
        return tuple(figure for figure in self.figures if not figure.agrees)

    @property
    def agrees(self) -> bool:
        """Say whether nothing speaks against the formulas."""
        return not self.differing and not self.failed

    @property
    def headline(self) -> str:
        """Return the result as one sentence, without a full stop."""
        if self.problem is not None:
            return f"{'Failed' if self.failed else 'Not compared'}: {self.problem}"
        compared = [figure for figure in self.figures if figure.comparable]
        if not compared:
            return "Not compared: no figure is known to both sides"
        if self.differing:
            return f"Differs: {len(self.differing)} of {len(compared)} figures are not what llama.cpp says"
        if any(figure.planned.source is Source.ESTIMATED for figure in compared):
            return "Agrees: estimated figures are within their bounds, all others are the same to the byte"
        return f"Equal: all {len(compared)} figures that both sides know are the same to the byte"


def verify(
    model: ModelFacts, request: PlanRequest, machine: Machine, policy: Policy, build: LlamaBuild, oracle: Oracle
) -> Verification:
    """Return the comparison for the placement that would be launched. Raises InvalidRequest as the search does."""
    path = model.summary.path
    beside = [flag for name, flag in _BESIDE.items() if getattr(request, name)]
    beside += sorted({*request.passthrough} & adapters.COUNTED_FLAGS)
    notes = (f"{', '.join(beside)}: left out here, the model alone is compared",) if beside else ()
    request = replace(request, lora=None, mmproj=None, model_draft=None, spec_type=None, passthrough=())
    model = companions.attach(model, request)
    outcome = search.search(model, request, machine, policy, build, oracle)
    if not isinstance(outcome, Plan):
        return Verification(path, problem=_why_none(outcome), notes=notes)
    if outcome.fit_by_llama:
        return Verification(path, problem=outcome.warnings[-1], notes=notes)
    params = context_params(model, outcome.request)
    told = oracle(model, params, outcome.placement, machine)
    if told is None:
        return Verification(path, problem="llama.cpp gave no answer to a size-only load", failed=True, notes=notes)
    mirrored = replace(build, commit=PINNED_COMMIT)  # the question is whether the formulas hold for this build too
    own = account(model, params, outcome.placement, machine, mirrored)
    unmapped = account(model, replace(params, load_mode="none"), outcome.placement, machine, mirrored)
    host = replace(own.host, model=unmapped.host.model)  # a size-only load maps nothing
    rows = (*zip(outcome.placement.devices, own.devices, told.devices, strict=True), ("Host", host, told.host))
    return Verification(path, tuple(each for row in rows for each in _compared(*row)), notes=notes)


def _why_none(outcome: NoFit | Refused) -> str:
    line = headline(outcome)
    return line[0].lower() + line[1:] if isinstance(outcome, NoFit) else line


def _compared(device: str, own: DeviceBytes, told: DeviceBytes) -> list[Compared]:
    return [Compared(device, name, getattr(own, name), getattr(told, name)) for name in _COMPONENTS]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def build_line(build: LlamaBuild) -> str:
    """Return which llama.cpp was asked, and whether it is the one whose source the formulas mirror."""
    line = f"llama.cpp {build.version} (commit {build.commit}), {build.path}"
    return line if is_pinned(build) else f"{line}; another build than the formulas mirror (commit {PINNED_COMMIT})"


def to_json(build: LlamaBuild, results: tuple[Verification, ...]) -> dict[str, Any]:
    """Return the object that ``planner verify --json`` prints. Unknown is None, never 0."""
    return {
        "schema": SCHEMA,
        "agrees": all(result.agrees for result in results),
        "llama": {
            "path": build.path,
            "version": build.version,
            "commit": build.commit,
            "is_mirrored": is_pinned(build),
        },
        "models": [_model(result) for result in results],
    }


def _model(result: Verification) -> dict[str, Any]:
    return {
        "path": result.path,
        "agrees": result.agrees,
        "headline": result.headline,
        "problem": result.problem,
        "figures": [
            {
                "device": figure.device,
                "component": figure.component,
                "planned_bytes": figure.planned.bytes,
                "source": figure.planned.source.value,
                "told_bytes": figure.told.bytes,
                "difference_bytes": figure.difference_bytes,
                "agrees": figure.agrees if figure.comparable else None,
            }
            for figure in result.figures
        ],
        "notes": list(result.notes),
    }


def to_text(build: LlamaBuild, result: Verification) -> str:
    """Return one model's comparison, side by side, ready to print."""
    lines = [f"{result.headline}.", f"{result.path} · {build_line(build)}", ""]
    if result.figures:
        rows = [_HEADINGS, *(_row(figure) for figure in result.figures)]
        lines += [aligned(row, columns(rows), n_left=3) for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)]).rstrip() + "\n"


def to_lines(build: LlamaBuild, results: tuple[Verification, ...]) -> str:
    """Return one line per model, ready to print, those that differ with what differs most."""
    lines = [build_line(build)]
    for result in results:
        lines.append(f"{result.path}: {result.headline}")
        if result.differing:
            worst = max(result.differing, key=lambda figure: abs(figure.difference_bytes or 0))
            lines.append(
                f"    {worst.device} {worst.component}: planned {_bytes(worst.planned.bytes)}, "
                f"llama.cpp says {_bytes(worst.told.bytes)}"
            )
    return "\n".join(lines) + "\n"


def _row(figure: Compared) -> tuple[str, ...]:
    difference = figure.difference_bytes if figure.comparable else None
    words = "not compared" if difference is None else f"{difference:+,}" if difference else "0"
    mark = "" if figure.agrees else "  <-"
    planned, told = _bytes(figure.planned.bytes), _bytes(figure.told.bytes)
    return (figure.device, figure.component, figure.planned.source.value, planned, told, words + mark)


def _bytes(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes:,}"
