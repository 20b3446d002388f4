"""A plan beside what llama-server would do with other flags, as JSON and for a terminal. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from planner import overrides
from planner.explain import headline, to_json
from planner.text import BOLD, DIM, PLAIN, RED, Style, aligned, bounded, columns, rate, size, wrap
from planner.types.machine import DeviceKind
from planner.types.plan import NoFit, Plan, PlanOutcome, Refused
from planner.types.usage import DeviceUsage
from planner.versus import Versus

_OURS: Final = "planned here"
_NO_SPEED: Final = "-"


def versus_to_json(ours: PlanOutcome, theirs: Versus) -> dict[str, Any]:
    """Return the document of the plan, with the other's under ``versus``."""
    other = {"name": theirs.name, "flags": theirs.flags, "notes": list(theirs.notes), "plan": to_json(theirs.outcome)}
    return {**to_json(ours), "versus": other}


def versus_to_text(ours: PlanOutcome, theirs: Versus, width: int = 80, style: Style = PLAIN) -> str:
    """Return both in a table, what is to be known of the other flags, and the command that says more of the plan."""
    width = bounded(width)
    rows = [("", _OURS, theirs.name), *_rows(ours, theirs.outcome)]
    widths = columns(rows)
    colour = BOLD if isinstance(theirs.outcome, Plan) else f"{BOLD};{RED}"
    sentences = [
        *(style.paint(BOLD, line) for line in _sentence(_OURS, headline(ours), width)),
        *(style.paint(colour, line) for line in _sentence(theirs.name, _verdict(theirs.outcome), width)),
    ]
    table = [style.paint(DIM, aligned(rows[0], widths, 1)), *(aligned(row, widths, 1) for row in rows[1:])]
    told = [line for text in (f"{theirs.name}: {theirs.flags}", *theirs.notes) for line in wrap("  ", text, width)]
    more = wrap("", "The plan with its command line and reasons: the same words without --versus.", width)
    return "\n\n".join("\n".join(block) for block in (sentences, table, told, more)) + "\n"


def _sentence(name: str, verdict: str, width: int) -> list[str]:
    return wrap(f"{name[0].upper()}{name[1:]}: ", f"{verdict}.", width)


def _verdict(outcome: PlanOutcome) -> str:
    """Say whether it would run out of memory, and where by how much."""
    if isinstance(outcome, NoFit):
        lacks = ", ".join(f"{cause.device} by {size(cause.shortfall_bytes)}" for cause in outcome.causes)
        return f"Would run out of memory: {lacks}" if lacks else headline(outcome)
    return headline(outcome)


def _rows(ours: PlanOutcome, theirs: PlanOutcome) -> Iterator[tuple[str, str, str]]:
    both = (ours, theirs)
    facts = (
        ("runs out of memory", _runs_out),
        ("layers on devices", _layers),
        ("parts of layers on the CPU", _parts),
        ("context of a conversation", _context),
        ("conversations at a time", lambda outcome: str(outcome.request.slots)),
        ("tokens a second", _speed),
    )
    for name, fact in facts:
        yield name, fact(both[0]), fact(both[1])
    left = [_left(outcome) for outcome in both]
    for device in dict.fromkeys((*left[0], *left[1])):
        yield f"left on {device}", left[0].get(device, "?"), left[1].get(device, "?")


def _runs_out(outcome: PlanOutcome) -> str:
    return {Plan: "no", NoFit: "yes", Refused: "is refused"}[type(outcome)]


def _layers(outcome: PlanOutcome) -> str:
    if isinstance(outcome, Refused) or (isinstance(outcome, Plan) and outcome.fit_by_llama):
        return "?"
    layers = sum(len(usage.layers) for usage in outcome.usages if usage.kind is not DeviceKind.HOST)
    return f"{layers} of {outcome.model.n_layers}"


def _parts(outcome: PlanOutcome) -> str:
    spilled = overrides.spilled(outcome.request)
    return "none" if not spilled else "some" if spilled.startswith("parts") else spilled.removesuffix(" on the CPU")


def _context(outcome: PlanOutcome) -> str:
    per_slot = None if isinstance(outcome, Refused) else outcome.n_ctx_per_slot
    return "?" if per_slot is None else f"{per_slot:,}"


def _speed(outcome: PlanOutcome) -> str:
    decode = outcome.decode if isinstance(outcome, Plan) else None
    return _NO_SPEED if decode is None else rate(decode.tokens_per_second)


def _left(outcome: PlanOutcome) -> dict[str, str]:
    """Return what is left of each device's free bytes, margins aside, so that both are measured alike."""
    return {} if isinstance(outcome, Refused) else {usage.name: size(_free_after(usage)) for usage in outcome.usages}


def _free_after(usage: DeviceUsage) -> int | None:
    occupied = usage.occupied_bytes
    return None if usage.free_bytes is None or occupied is None else usage.free_bytes - occupied
