"""Several models' outcomes as JSON and for a terminal. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from planner.explain import SCHEMA, headline, to_json
from planner.text import BOLD, DIM, PLAIN, RED, YELLOW, Style, aligned, bounded, columns, ranges, rate, size, wrap
from planner.together import Together
from planner.types.plan import Plan, PlanOutcome
from planner.types.usage import DeviceUsage

_HEADINGS: Final = ("device", "model", "layers", "takes", "left")
_LEFT_ALIGNED: Final = 3


def together_headline(result: Together) -> str:
    """Return the answer as one sentence, without a full stop."""
    count = len(result.outcomes)
    if result.fits:
        return f"They fit together: all {count} models can be loaded at a time"
    fitting = sum(isinstance(outcome, Plan) for outcome in result.outcomes)
    return f"They do not fit together: {fitting} of {count} models can be loaded at a time"


def together_to_json(result: Together) -> dict[str, Any]:
    """Return the object that ``planner explain A B --json`` prints: each plan is the document of that model alone."""
    return {
        "schema": SCHEMA,
        "fits": result.fits,
        "headline": together_headline(result),
        "left_bytes": dict(result.left_bytes),
        "plans": [to_json(outcome) for outcome in result.outcomes],
    }


def together_to_text(result: Together, width: int = 80, style: Style = PLAIN, words: Sequence[str] = ()) -> str:
    """Return the answer, a sentence for each model, and what each takes on which device, ready to print.

    ``words`` are how the models were written on the command line: the paths of their files, where not given.
    """
    width = bounded(width)
    names = _names(words or [outcome.model.path for outcome in result.outcomes])
    colour = BOLD if result.fits else f"{BOLD};{RED}"
    blocks = [[style.paint(colour, line) for line in wrap("", together_headline(result) + ".", width)]]
    blocks.append([line for pair in zip(names, result.outcomes, strict=True) for line in _model(*pair, width, style)])
    blocks.append(_table(result, names, width, style))
    warnings = dict.fromkeys(warning for outcome in result.outcomes for warning in outcome.warnings)
    blocks.append([line for text in warnings for line in wrap(style.paint(YELLOW, "warning: "), text, width)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _names(words: Sequence[str]) -> list[str]:
    """Return what each model is called: its name or its file's, without folders and ending."""
    return [word.rpartition("/")[2].removesuffix(".gguf") for word in words]


def _model(name: str, outcome: PlanOutcome, width: int, style: Style) -> list[str]:
    decode = outcome.decode if isinstance(outcome, Plan) else None
    speed = "" if decode is None else f", about {rate(decode.tokens_per_second)} tokens a second"
    lines = wrap(f"{name}: ", headline(outcome) + speed, width)
    return lines if isinstance(outcome, Plan) else [style.paint(RED, line) for line in lines]


def _table(result: Together, names: Sequence[str], width: int, style: Style) -> list[str]:
    rows = list(_rows(result, names))
    widths = columns([_HEADINGS, *rows])
    excess = max(sum(widths) + 2 * (len(widths) - 1) - width, 0)
    widths[1] = max(widths[1] - excess, len(_HEADINGS[1]))
    clipped = [(device, style.clipped(name, widths[1]), *rest) for device, name, *rest in rows]
    heading = style.paint(DIM, aligned(_HEADINGS, widths, _LEFT_ALIGNED))
    return [heading, *(aligned(row, widths, _LEFT_ALIGNED) for row in clipped)] if rows else []


def _rows(result: Together, names: Sequence[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield a row for each model on each device, what is left with the last of a device."""
    plans = [(name, outcome) for name, outcome in zip(names, result.outcomes, strict=True) if isinstance(outcome, Plan)]
    for device, left in result.left_bytes.items():
        used = ((name, usage) for name, plan in plans for usage in plan.usages if usage.name == device)
        shares = [(name, usage) for name, usage in used if _is_used(usage)]
        if not shares:
            yield device, "-", "-", "0", size(left)
        for place, (name, usage) in enumerate(shares):
            is_last = place == len(shares) - 1
            layers = " ".join(part for part in (ranges(usage.layers), "+out" if usage.output else "") if part)
            taken = size(usage.occupied_bytes)
            yield "" if place else device, name, layers or "-", taken, size(left) if is_last else ""


def _is_used(usage: DeviceUsage) -> bool:
    return usage.planned_bytes is None or usage.planned_bytes > 0
