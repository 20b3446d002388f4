"""Trees of files as a kernel would show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

MEMINFO = "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB"  # 64 GiB, half of them free


def write_tree(root: Path, files: Mapping[str, str | int]) -> None:
    """Write files below a root, as sysfs or procfs would show them."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def host_tree(root: Path, **files: str) -> Path:
    """Write a machine with that memory and with these files; return its root."""
    write_tree(root, {"proc/meminfo": MEMINFO} | dict(files))
    return root
