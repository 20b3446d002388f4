"""What differs by ``general.architecture``, as data: windows, caches, and what of the file is left out."""

from __future__ import annotations

from planner.architectures.rules import Architecture, Cache, Recurrent, Window
from planner.architectures.table import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "Cache", "Recurrent", "Window"]
