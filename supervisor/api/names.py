"""A model's name and the tag that Ollama's clients write or leave out."""

from __future__ import annotations

from typing import Final

DEFAULT_TAG: Final = ":latest"


def folded(name: str) -> str:
    """Return what the spellings of one name have in common, as Ollama compares them."""
    return name.lower().removesuffix(DEFAULT_TAG)
