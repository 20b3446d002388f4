"""The settings as a text table, JSON, Markdown and a dict for the start-up log. Secrets are never shown.

``python -m config.render`` prints ``docs/settings.md``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from config.resolve import DEFAULT_ORIGIN, Value
from config.table import SETTINGS


def text_table(values: Iterable[Value]) -> str:
    """Return what ``planner config`` prints: name, effective value, where it came from."""
    rows = [("setting", "value", "from"), *((v.setting.variable, v.shown, v.origin) for v in values)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {shown:<{widths[1]}}  {origin}" for name, shown, origin in rows)


def as_json(values: Iterable[Value], warnings: Iterable[str] = ()) -> dict[str, Any]:
    """Return what ``planner config --json`` prints: numbers as numbers, everything structured as its text."""
    return {
        "settings": [
            {
                "name": value.setting.variable,
                "value": _json_value(value),
                "shown": value.shown,
                "unit": value.setting.unit or None,
                "origin": value.origin,
                "default": value.setting.default_shown,
                "meaning": value.setting.meaning,
            }
            for value in values
        ],
        "warnings": list(warnings),
    }


def log_values(values: Iterable[Value]) -> dict[str, str]:
    """Return the effective configuration for the start-up log, what was not defaulted marked with its origin."""
    return {
        value.setting.field: value.shown + ("" if value.origin == DEFAULT_ORIGIN else f" ({value.origin})")
        for value in values
    }


def _json_value(value: Value) -> Any:
    if value.setting.secret:
        return None
    plain = value.value is None or isinstance(value.value, bool | int | str)
    finite = isinstance(value.value, float) and math.isfinite(value.value)
    return value.value if plain or finite else value.shown


def markdown_table() -> str:
    """Return the table of settings, a row for each."""
    rows = [(f"`{s.variable}`", f"`{s.default_shown}`", _cell(s.kind.allowed), _cell(s.meaning)) for s in SETTINGS]
    return _markdown(("variable", "default", "allowed", "meaning"), rows)


def ollama_markdown_table() -> str:
    """Return the table that maps our variables to Ollama's."""
    rows = [
        (f"`{s.variable}`", f"`{s.ollama_variable}`" if s.ollama else "-", _cell(s.ollama_note))
        for s in SETTINGS
        if s.ollama or s.ollama_note
    ]
    return _markdown(("ours", "taken where ours is unset", "what differs"), rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_page() -> str:
    """Return the page of settings of the documentation, as a file's whole text."""
    return f"""# Settings

Every setting is an environment variable. An empty one counts as unset. A value that is not allowed stops the start,
with every such value listed; an unknown `PLANNER_` name is warned about. `planner config` prints the effective values
and where each came from. Sizes are binary: `8G`, `8GB` and `8GiB` are the same. This page is printed by
`python -m config.render`.

{markdown_table()}

## Ollama's variables

Where one of ours is unset, Ollama's variable of the same meaning is taken, so that an existing deployment carries over.
A bad value of Ollama's is warned about once and the default is taken, as Ollama does.

{ollama_markdown_table()}
"""


if __name__ == "__main__":
    sys.stdout.write(markdown_page())
