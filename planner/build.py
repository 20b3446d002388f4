"""The llama.cpp that the formulas of this package are exact for."""

from __future__ import annotations

from typing import Final

from planner.types.machine import LlamaBuild

PINNED_COMMIT: Final = "0c1e570"
PINNED_VERSION: Final = "0.5.0-dev"
PINNED_BUILD: Final = LlamaBuild(path=None, version=PINNED_VERSION, commit=PINNED_COMMIT)


def is_pinned(build: LlamaBuild) -> bool:
    """Say whether this build is the one whose source the formulas mirror; for another they are estimates."""
    return build.commit is not None and build.commit.startswith(PINNED_COMMIT)
