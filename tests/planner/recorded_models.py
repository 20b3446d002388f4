"""Models whose headers are recorded under ``fixtures``, written when a test first asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from gguf_files import write_header

from planner.model import ModelFacts, read_model

ReadModel: TypeAlias = Callable[[str], ModelFacts]


def reader(folder: Path, entries: Mapping[str, Any]) -> ReadModel:
    """Return a function from an entry's name to its model, of which each is written and read once."""

    @cache
    def read(name: str) -> ModelFacts:
        entry = entries[name]
        path = folder / f"{name}.gguf"
        write_header(path, entry["architecture"], entry["metadata"], entry["tensors"], tokens=entry["vocabulary"])
        return read_model(str(path))

    return read
