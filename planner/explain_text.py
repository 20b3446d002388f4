"""An outcome for a terminal: a sentence, a table with a bar per device, the command line, the reasons."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from planner.explain import headline, overhead_because
from planner.types import DecodeEstimate, DeviceUsage, HostDetail, NoFit, Plan, PlanOutcome, Refused
from planner.units import GIB, KIB, MIB, TIB

MIN_WIDTH: Final = 60  # narrower than this no table is readable; lines then run over
MAX_WIDTH: Final = 120  # longer lines are tiring to read
_UNKNOWN: Final = "?"
_GAP: Final = "  "
_HEADINGS: Final = ("device", "layers", "weights", "context", "compute", "overhead", "free", "headroom")
_PARTS: Final = ("weights", "context", "compute", "overhead")
_FULL: Final = 1000  # from here a figure is written in the next unit, so that none is wider than eight characters

_FAST: Final = 100  # tokens a second: more digits would promise too much

_SHARE: Final = " 100 %"
_FAR_OVER: Final = ">999 %"

_BOLD: Final = "1"
_DIM: Final = "2"
_RED: Final = "31"
_YELLOW: Final = "33"
_PART_COLOURS: Final = ("34", "36", "35", "33")


@dataclass(frozen=True, slots=True)
class Style:
    """How to draw: in colour or not, with block characters or plain ASCII."""

    colour: bool = False
    unicode: bool = True

    @property
    def blocks(self) -> str:
        """Return one character per part of a bar, in the order of the table."""
        return "█▓▒░" if self.unicode else "#=+-"

    @property
    def rest(self) -> str:
        """Return the character for memory that stays free."""
        return "·" if self.unicode else "."

    def paint(self, code: str, text: str) -> str:
        """Return the text in this colour where colours are wanted."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text


def to_text(outcome: PlanOutcome, width: int = 80, style: Style = Style()) -> str:
    """Return the whole explanation, ready to print, at most ``width`` columns where words allow it."""
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    blocks = [_title(outcome, width, style)]
    if not isinstance(outcome, Refused):
        blocks.append(_table(outcome.usages, width, style) + _host_lines(outcome.host, width, style))
    if isinstance(outcome, NoFit):
        blocks.append(_nearest(outcome, style))
    if isinstance(outcome, Plan) and outcome.decode is not None:
        blocks.append(_decode(outcome.decode, width))
    if isinstance(outcome, Plan):
        blocks.append(_launch(outcome, width, style))
    blocks.append(_reasons(outcome, width, style))
    blocks.append([line for text in outcome.warnings for line in _wrap(style.paint(_YELLOW, "warning: "), text, width)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def size(size_bytes: int | None) -> str:
    """Return a figure of at most eight characters: ``8.1 GiB``, ``512 MiB``, ``0``; ``?`` where it is not known."""
    if size_bytes is None:
        return _UNKNOWN
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) * KIB >= _FULL * unit:
            value = size_bytes / unit
            return f"{value:.0f} {name}" if abs(value) >= 99.95 else f"{value:.1f} {name}"  # noqa: PLR2004 - rounds to 100.0
    return f"{size_bytes} B" if size_bytes else "0"


def ranges(layers: Sequence[int]) -> str:
    """Return layer numbers as ranges: ``0-13,20``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


# ---------------------------------------------------------------------------------------------------------------------
# Above the table


def _scaled(number: int) -> str:
    billions = number / 1e9
    return f"{billions:.1f} B" if round(billions, 1) else f"{number / 1e6:.1f} M"


def _title(outcome: PlanOutcome, width: int, style: Style) -> list[str]:
    sentence = textwrap.wrap(headline(outcome) + ".", width)
    colour = _BOLD if isinstance(outcome, Plan) else f"{_BOLD};{_RED}"
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
    return [style.paint(_DIM, part) for part in textwrap.wrap(line, width)]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _table(usages: Sequence[DeviceUsage], width: int, style: Style) -> list[str]:
    rows = [_row(usage) for usage in usages]
    widths = [max(len(cell) for cell in column) for column in zip(_HEADINGS, *rows, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    if excess > 0:  # a worker that is out of reach is called by its address
        widths[0] = max(widths[0] - excess, len(_HEADINGS[0]))
        rows = [(_clipped(row[0], widths[0], style), *row[1:]) for row in rows]
    indent = widths[0] + len(_GAP)
    room = min(width, sum(widths) + len(_GAP) * (len(widths) - 1)) - indent
    lines = [style.paint(_DIM, _line(_HEADINGS, widths))]
    for usage, row in zip(usages, rows, strict=True):
        over = (usage.headroom_bytes or 0) < 0
        lines.append(style.paint(_RED, _line(row, widths)) if over else _line(row, widths))
        lines.append(" " * indent + _bar(usage, room, style))
    return [*lines, _legend(style)]


def _clipped(name: str, width: int, style: Style) -> str:
    mark = "…" if style.unicode else "~"
    return name if len(name) <= width else name[: width - 1] + mark


def _row(usage: DeviceUsage) -> tuple[str, ...]:
    layers = " ".join(part for part in (ranges(usage.layers), "+out" if usage.output else "") if part)
    figures = (usage.model.bytes, usage.context.bytes, usage.compute.bytes, usage.overhead_bytes, usage.free_bytes)
    return (usage.name, layers or "-", *(size(figure) for figure in figures), size(usage.headroom_bytes))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left, right = zip(cells[:2], widths[:2], strict=True), zip(cells[2:], widths[2:], strict=True)
    return _GAP.join([*(cell.ljust(wide) for cell, wide in left), *(cell.rjust(wide) for cell, wide in right)])


def _bar(usage: DeviceUsage, width: int, style: Style) -> str:
    """Draw the parts of the plan on the scale of what is free, or of the plan where that is more."""
    parts = (usage.model.bytes, usage.context.bytes, usage.compute.bytes, usage.overhead_bytes)
    planned = usage.planned_bytes
    if planned is None or usage.free_bytes is None:
        return style.paint(_DIM, "not known")
    scale = max(planned, usage.free_bytes, 1)
    room = width - len(_SHARE)
    ends = [round(room * sum(part or 0 for part in parts[: i + 1]) / scale) for i in range(len(parts))]
    cells = [
        style.paint(colour, block * (end - start))
        for colour, block, start, end in zip(_PART_COLOURS, style.blocks, [0, *ends], ends, strict=False)
    ]
    share = f"{planned / usage.free_bytes:.0%}".replace("%", " %") if usage.free_bytes else ""
    share = share if len(share) <= len(_SHARE) else _FAR_OVER
    return "".join(cells) + style.paint(_DIM, style.rest * (room - ends[-1])) + share.rjust(len(_SHARE))


def _legend(style: Style) -> str:
    parts = [
        f"{style.paint(colour, block)} {part}"
        for colour, block, part in zip(_PART_COLOURS, style.blocks, _PARTS, strict=True)
    ]
    return _GAP.join([*parts, f"{style.paint(_DIM, style.rest)} free"])


def _host_lines(host: HostDetail, width: int, style: Style) -> list[str]:
    figures = (
        ("mapped from the file", host.mapped_bytes),
        ("allocated", host.allocated_bytes),
        ("pinned", host.pinned_bytes),
        ("output buffer", host.output_buffer_bytes),
        ("prompt cache, at most", host.prompt_cache_bytes),
    )
    text = ", ".join(f"{name} {size(figure)}" for name, figure in figures if figure)
    return [style.paint(_DIM, line) for line in _wrap("Host: ", text, width)] if text else []


# ---------------------------------------------------------------------------------------------------------------------
# Below it


def _nearest(no_fit: NoFit, style: Style) -> list[str]:
    lines = [style.paint(_DIM, "Needed:")]
    lines += [
        f"  {cause.device} needs {size(cause.needed_bytes)} and has {size(cause.available_bytes)}"
        for cause in no_fit.causes
    ]
    if no_fit.nearest:
        lines += ["", style.paint(_DIM, "Tried instead, one change at a time:")]
    return lines + [f"  {near.change}: {'fits' if near.fits else 'does not fit either'}" for near in no_fit.nearest]


def _decode(decode: DecodeEstimate, width: int) -> list[str]:
    speed = (
        f"{decode.tokens_per_second:,.0f}" if decode.tokens_per_second >= _FAST else f"{decode.tokens_per_second:.1f}"
    )
    return _wrap(f"About {speed} tokens a second", f": {decode.basis}", width)


def _launch(plan: Plan, width: int, style: Style) -> list[str]:
    env = [f"{name}={shlex.quote(value)}" for name, value in plan.launch.env.items()]
    words = [*env, *(shlex.quote(word) for word in plan.launch.argv)]
    return [style.paint(_DIM, "Started as:"), *_command(_with_values(words), width)]


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
    lines = [style.paint(_DIM, "Why:")]
    for because, chosen in choices.items():
        lines += _wrap("  ", f"{', '.join(chosen)} ({because})", width)
    return lines


def _wrap(lead: str, text: str, width: int) -> list[str]:
    indent = " " * (2 if lead.strip() else 4)
    return textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=indent)
