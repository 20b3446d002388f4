"""How Ollama writes names and numbers."""

from __future__ import annotations

from typing import Final

from supervisor.api.names import DEFAULT_TAG

BILLION: Final = 1_000_000_000
MILLION: Final = 1_000_000
THOUSAND: Final = 1_000


def shown(model: str) -> str:
    """Return a model's id as Ollama lists it: with a tag, ``:latest`` where it has none."""
    return model if ":" in model.rpartition("/")[2] else f"{model}{DEFAULT_TAG}"


def human_number(count: int) -> str:
    """Return a number of parameters as ``8B``, ``7.2B``, ``137.00M`` or ``22M`` (format/format.go, ``HumanNumber``)."""
    if count >= BILLION:
        return f"{count // BILLION}B" if count % BILLION == 0 else f"{count / BILLION:.1f}B"
    if count >= MILLION:
        return f"{count // MILLION}M" if count % MILLION == 0 else f"{count / MILLION:.2f}M"
    return f"{count / THOUSAND:.0f}K" if count >= THOUSAND else str(count)
