"""What the commands print: JSON of the service in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from planner.units import format_size

UNKNOWN: Final = "?"
MINUTE_S: Final = 60.0
HOUR_S: Final = 3600.0
DAY_S: Final = 86400.0


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are as wide as they have to be; the head alone where there are no rows."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]
    return "".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def running(status: Mapping[str, Any]) -> str:
    """Return what ``planner ps`` prints: every runner that is loaded, loading, or has failed."""
    rows = [_running_row(runner, status["now"]) for runner in status["runners"] if runner["state"] != "stopped"]
    return columns(("model", "state", "busy", "context", "memory", "until", "pid"), rows)


def _running_row(runner: Mapping[str, Any], now: float) -> tuple[str, ...]:
    slots = runner["slots"]
    busy = f"{runner['in_flight']}/{UNKNOWN if slots is None else slots}"
    if runner["waiting"]:
        busy += f" +{runner['waiting']}"
    context = runner["context_per_slot"]
    return (
        runner["model"],
        runner["state"],
        busy,
        UNKNOWN if context is None else f"{context:,}",
        _memory(runner["devices"]),
        _until(runner, now),
        str(runner["pid"] or "-"),
    )


def _memory(devices: Iterable[Mapping[str, Any]]) -> str:
    """Return the bytes on each device: measured where they are, else planned."""
    parts = []
    for device in devices:
        figures = [one for one in (device["measured_bytes"], device["planned_bytes"]) if one is not None]
        if not figures or max(figures):
            parts.append(f"{device['device']} {format_size(max(figures)) if figures else UNKNOWN}")
    return ", ".join(parts) or "-"


def _until(runner: Mapping[str, Any], now: float) -> str:
    if runner["retry_at"] is not None:
        return f"tried again in {duration(runner['retry_at'] - now)}"
    if runner["state"] != "ready":
        return "-"
    if runner["in_flight"]:
        return "in use"
    return "for ever" if runner["expires_at"] is None else f"{duration(runner['expires_at'] - now)} from now"


def yielded(told: Mapping[str, Any], wanted_bytes: int) -> str:
    """Return what ``planner yield`` prints: what is free now, and what is missing and why."""
    device, free_bytes = told["device"], told["free_bytes"]
    free = "nobody knows how much" if free_bytes is None else format_size(free_bytes)
    lines = [f"{device}: {format_size(told['freed_bytes'])} given back, {free} free now"]
    awaited = told["awaited_bytes"]
    if told["short_bytes"]:
        lines.append(f"{device}: {format_size(told['short_bytes'])} of {format_size(wanted_bytes)} are still missing")
        if told["short_bytes"] > sum(awaited.values()):
            lines[-1] += ": what else is used there is not ours, or pinned"
    lines += [
        f"{device}: {format_size(size)} more when {model}, which takes no new request, has finished what it serves"
        for model, size in awaited.items()
    ]
    return "".join(f"{line}\n" for line in lines)


def models(status: Mapping[str, Any]) -> str:
    """Return what ``planner list`` prints: every model, and below what is wrong with those that cannot be asked."""
    rows = [
        (
            model["id"],
            model["state"],
            model["role"],
            model["architecture"] or UNKNOWN,
            format_size(model["file_bytes"]),
            f"{duration(status['now'] - model['modified_at'])} ago",
        )
        for model in status["models"]
    ]
    table = columns(("model", "state", "role", "architecture", "size", "changed"), rows)
    problems = [f"{model['id']}: {model['problem']}\n" for model in status["models"] if model["problem"]]
    return table + "".join(problems)


def described(model: str, told: Mapping[str, Any]) -> str:
    """Return what ``planner show`` prints of Ollama's answer to ``/api/show``."""
    details, info = told.get("details", {}), told.get("model_info", {})
    architecture = info.get("general.architecture", UNKNOWN)
    rows = [
        ("architecture", architecture),
        ("parameters", details.get("parameter_size") or UNKNOWN),
        ("quantization", details.get("quantization_level") or UNKNOWN),
        ("trained context", f"{info.get(f'{architecture}.context_length', UNKNOWN)}"),
        ("embedding length", f"{info.get(f'{architecture}.embedding_length', UNKNOWN)}"),
        ("capabilities", ", ".join(told.get("capabilities", ())) or "-"),
    ]
    texts = ((name, told.get(name)) for name in ("parameters", "system", "template", "license"))
    return columns((model, ""), rows) + "".join(f"\n{name}\n{text.rstrip()}\n" for name, text in texts if text)


def duration(seconds: float) -> str:
    """Return a span as people say it, in its largest unit: ``3 minutes``; never less than a second."""
    for name, length in (("day", DAY_S), ("hour", HOUR_S), ("minute", MINUTE_S)):
        if seconds >= length:
            count = int(seconds / length)
            return f"{count} {name}{'' if count == 1 else 's'}"
    count = max(1, round(seconds))
    return f"{count} second{'' if count == 1 else 's'}"
