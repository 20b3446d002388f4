"""An outcome for a terminal: a sentence, a table with a bar per device, the command line, the reasons."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from planner.explain import headline, overhead_because
from planner.limits import limits
from planner.text import BOLD, DIM, GAP, PLAIN, RED, YELLOW, Style, aligned, bounded, columns, ranges, rate, size, wrap
from planner.types.machine import DeviceKind
from planner.types.plan import DecodeEstimate, NoFit, Plan, PlanOutcome, Refused
from planner.types.usage import DeviceUsage, HostDetail

_HEADINGS: Final = ("device", "layers", "weights", "context", "compute", "overhead", "free", "headroom")
_NARROW_HEADINGS: Final = ("device", "layers", "takes", "free", "headroom")
_PARTS: Final = ("weights", "context", "compute", "overhead")

_SHARE: Final = " 100 %"
_FAR_OVER: Final = ">999 %"

_PART_COLOURS: Final = ("34", "36", "35", "33")


def to_text(outcome: PlanOutcome, width: int = 80, style: Style = PLAIN, more: Sequence[str] = ()) -> str:
    """Return the whole explanation, ready to print, at most ``width`` columns where words allow it.

    ``more`` is what one more GiB would buy, a line for each device (``planner.limits.one_more_gib``).
    """
    width = bounded(width)
    blocks = [_title(outcome, width, style)]
    if not isinstance(outcome, Refused):
        blocks.append(_table(outcome.usages, outcome.host, width, style) + _host_lines(outcome.host, width, style))
    if isinstance(outcome, NoFit):
        blocks.append(_nearest(outcome, style))
    if isinstance(outcome, Plan) and outcome.decode is not None:
        blocks.append(_decode(outcome.decode, width))
    if isinstance(outcome, Plan):
        blocks.append(_listed("What limits it:", limits(outcome), width, style))
        blocks.append(_listed("One more GiB would buy:", more, width, style))
        blocks.append(_launch(outcome, width, style))
    blocks.append(_reasons(outcome, width, style))
    blocks.append([line for text in outcome.warnings for line in wrap(style.paint(YELLOW, "warning: "), text, width)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Above the table


def _scaled(number: int) -> str:
    billions = number / 1e9
    return f"{billions:.1f} B" if round(billions, 1) else f"{number / 1e6:.1f} M"


def _title(outcome: PlanOutcome, width: int, style: Style) -> list[str]:
    sentence = textwrap.wrap(headline(outcome) + ".", width)
    colour = BOLD if isinstance(outcome, Plan) else f"{BOLD};{RED}"
    return [*(style.paint(colour, line) for line in sentence), *_model(outcome, width, style)]


def _model(outcome: PlanOutcome, width: int, style: Style) -> list[str]:
    model = outcome.model
    facts = (
        model.name or model.path.rpartition("/")[2],
        model.architecture,
        model.quantization,
        size(model.file_bytes),
        f"{_scaled(model.n_params)} parameters",
        f"trained for {model.n_ctx_train:,} tokens" if model.n_ctx_train else None,
    )
    separator = " · " if style.unicode else ", "
    line = separator.join(fact for fact in facts if fact)
    return [style.paint(DIM, part) for part in textwrap.wrap(line, width)]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _table(usages: Sequence[DeviceUsage], host: HostDetail, width: int, style: Style) -> list[str]:
    """Return a row and a bar for each device; without the parts' columns where they would not fit."""
    headings: tuple[str, ...] = _HEADINGS
    rows = [_row(usage, host) for usage in usages]
    if _width([headings, *((headings[0], *row[1:]) for row in rows)]) > width:
        headings, rows = _NARROW_HEADINGS, [_narrow_row(usage, host) for usage in usages]
    widths = columns([headings, *rows])
    excess = _width([headings, *rows]) - width
    if excess > 0:  # a worker that is out of reach is called by its address
        widths[0] = max(widths[0] - excess, len(headings[0]))
        rows = [(style.clipped(row[0], widths[0]), *row[1:]) for row in rows]
    indent = widths[0] + len(GAP)
    room = min(width, sum(widths) + len(GAP) * (len(widths) - 1)) - indent
    lines = [style.paint(DIM, aligned(headings, widths))]
    for usage, row in zip(usages, rows, strict=True):
        over = (usage.headroom_bytes or 0) < 0
        lines.append(style.paint(RED, aligned(row, widths)) if over else aligned(row, widths))
        lines.append(" " * indent + _bar(usage, host, room, style))
    return [*lines, _legend(style)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    widths = columns(rows)
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _narrow_row(usage: DeviceUsage, host: HostDetail) -> tuple[str, ...]:
    name, layers, *_, free, headroom = _row(usage, host)
    return (name, layers, size(usage.occupied_bytes), free, headroom)


def _parts(usage: DeviceUsage, host: HostDetail) -> tuple[int | None, ...]:
    """Return what each column of the table shows, in order.

    The overhead includes what is kept free for a large image. On the host all is what has to be in memory: the weights
    without what lies between them in the mapped file, and in place of the overhead what llama-server keeps beside its
    buffers.
    """
    weights, beside = usage.model.bytes, usage.overhead_bytes + usage.image_reserve_bytes
    if usage.kind is DeviceKind.HOST:
        kept = (host.resident_bytes, host.allocated_bytes, host.pinned_bytes)
        weights = weights if weights is None or None in kept else sum(each or 0 for each in kept)
        beside += (host.output_buffer_bytes or 0) + host.later_bytes
    return (weights, usage.context.bytes, usage.compute.bytes, beside)


def _row(usage: DeviceUsage, host: HostDetail) -> tuple[str, ...]:
    layers = " ".join(part for part in (ranges(usage.layers), "+out" if usage.output else "") if part)
    figures = (*_parts(usage, host), usage.free_bytes)
    return (usage.name, layers or "-", *(size(figure) for figure in figures), size(usage.headroom_bytes))


def _bar(usage: DeviceUsage, host: HostDetail, width: int, style: Style) -> str:
    """Draw the parts of the plan on the scale of what is free, or of the plan where that is more."""
    parts, occupied = _parts(usage, host), usage.occupied_bytes
    if occupied is None or usage.free_bytes is None:
        return style.paint(DIM, "not known")
    scale = max(occupied, usage.free_bytes, 1)
    room = width - len(_SHARE)
    ends = [round(room * sum(part or 0 for part in parts[: i + 1]) / scale) for i in range(len(parts))]
    cells = [
        style.paint(colour, block * (end - start))
        for colour, block, start, end in zip(_PART_COLOURS, style.blocks, [0, *ends], ends, strict=False)
    ]
    share = f"{occupied / usage.free_bytes:.0%}".replace("%", " %") if usage.free_bytes else ""
    share = share if len(share) <= len(_SHARE) else _FAR_OVER
    return "".join(cells) + style.paint(DIM, style.rest * (room - ends[-1])) + share.rjust(len(_SHARE))


def _legend(style: Style) -> str:
    parts = [
        f"{style.paint(colour, block)} {part}"
        for colour, block, part in zip(_PART_COLOURS, style.blocks, _PARTS, strict=True)
    ]
    return GAP.join([*parts, f"{style.paint(DIM, style.rest)} free"])


def _host_lines(host: HostDetail, width: int, style: Style) -> list[str]:
    figures = (
        ("mapped from the file", host.mapped_bytes),
        ("of which in use", None if host.resident_bytes == host.mapped_bytes else host.resident_bytes),
        ("allocated", host.allocated_bytes),
        ("pinned", host.pinned_bytes),
        ("output buffer", host.output_buffer_bytes),
        ("prompt cache, at most", host.prompt_cache_bytes),
        ("context checkpoints, at most", host.checkpoint_bytes),
        ("kept for a large image", host.image_reserve_bytes),
    )
    text = ", ".join(f"{name} {size(figure)}" for name, figure in figures if figure)
    return [style.paint(DIM, line) for line in wrap("Host: ", text, width)] if text else []


# ---------------------------------------------------------------------------------------------------------------------
# Below it


def _nearest(no_fit: NoFit, style: Style) -> list[str]:
    lines = [style.paint(DIM, "Needed:")] if no_fit.causes else []
    lines += [
        f"  {cause.device} needs {size(cause.needed_bytes)} and has {size(cause.available_bytes)}"
        for cause in no_fit.causes
    ]
    if no_fit.nearest:
        lines += [*([""] if lines else []), style.paint(DIM, "Tried instead, one change at a time:")]
    return lines + [f"  {near.change}: {'fits' if near.fits else 'does not fit either'}" for near in no_fit.nearest]


def _decode(decode: DecodeEstimate, width: int) -> list[str]:
    return wrap(f"About {rate(decode.tokens_per_second)} tokens a second", f": {decode.basis}", width)


def _listed(title: str, sentences: Iterable[str], width: int, style: Style) -> list[str]:
    lines = [line for sentence in sentences for line in wrap("  ", sentence, width)]
    return [style.paint(DIM, title), *lines] if lines else []


def _launch(plan: Plan, width: int, style: Style) -> list[str]:
    env = [f"{name}={shlex.quote(value)}" for name, value in plan.launch.env.items()]
    words = [*env, *(shlex.quote(word) for word in plan.launch.argv)]
    return [style.paint(DIM, "Started as:"), *_command(_with_values(words), width)]


def _with_values(words: Iterable[str]) -> Iterator[str]:
    """Keep each flag on one line with its value."""
    held = ""
    for word in words:
        if held and not word.startswith("-"):
            yield f"{held} {word}"
            held = ""
            continue
        if held:
            yield held
        held = word if word.startswith("-") else ""
        if not held:
            yield word
    if held:
        yield held


def _command(chunks: Iterable[str], width: int) -> list[str]:
    lines: list[str] = []
    for chunk in chunks:
        if lines and len(lines[-1]) + 1 + len(chunk) + len(" \\") <= width:
            lines[-1] += f" {chunk}"
        else:
            lines.append(("    " if lines else "  ") + chunk)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _reasons(outcome: PlanOutcome, width: int, style: Style) -> list[str]:
    choices: dict[str, list[str]] = {}
    for decision in outcome.decisions:
        choices.setdefault(decision.because, []).append(f"{decision.step}: {decision.chosen}")
    for usage in () if isinstance(outcome, Refused) else outcome.usages:
        if because := overhead_because(usage):
            choices.setdefault(because, []).append(f"overhead of {usage.name}: {size(usage.overhead_bytes)}")
    if not choices:
        return []
    lines = [style.paint(DIM, "Why:")]
    for because, chosen in choices.items():
        lines += wrap("  ", f"{', '.join(chosen)} ({because})", width)
    return lines
