"""Control groups, both versions: which folders govern a process, and how many more threads they let it start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpu.kernel_files import lines, number

_FILE_SYSTEMS: Final = frozenset({"cgroup", "cgroup2"})
_MAX_LEVELS: Final = 64  # deeper nesting than any system makes: the walk up is bounded


@dataclass(frozen=True, slots=True)
class ThreadLimit:
    """How many more threads may be started, and what says so."""

    left: int
    by: str


def levels(root: Path, process: str, controller: str) -> list[tuple[Path, bool]]:
    """Return the folders of a process's group and of all groups above it, and whether each is version 2.

    ``controller`` is the kernel's word for what is limited (``memory``, ``pids``); ``root`` is for tests.
    """
    found: list[tuple[Path, bool]] = []
    for mount, mount_root, is_v2 in _mounts(root, process, controller):
        path = _own_path(root, process, "" if is_v2 else controller)
        if path is None:
            continue
        # Inside a container the mount may show only a part of the hierarchy; what lies above it cannot be read.
        below = path.removeprefix(mount_root) if path.startswith(mount_root) else ""
        folder = root / mount.lstrip("/") / below.lstrip("/")
        top = root / mount.lstrip("/")
        for _ in range(_MAX_LEVELS):
            found.append((folder, is_v2))
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent
    return found


def name_of(folder: Path, root: Path) -> str:
    """Return what to call a group in a line for the user."""
    return f"control group {'/' + str(folder.relative_to(root))}"


def thread_limit(process: str, root: Path = Path("/")) -> ThreadLimit | None:
    """Return the group that leaves a process fewest threads (pids.max, systemd's TasksMax=); None: no group limits."""
    found = []
    for folder, _ in levels(root, process, "pids"):
        most, now = number(folder / "pids.max"), number(folder / "pids.current")
        if most is not None and now is not None:
            found.append(ThreadLimit(max(most - now, 0), name_of(folder, root)))
    return min(found, key=lambda limit: limit.left, default=None)


def _mounts(root: Path, process: str, controller: str) -> list[tuple[str, str, bool]]:
    """Return (mount point, its root in the hierarchy, version 2) of every hierarchy that may govern this."""
    found = []
    for line in lines(root / "proc" / process / "mountinfo"):
        fields, _, rest = line.partition(" - ")
        parts, kinds = fields.split(), rest.split()
        if len(parts) < 5 or len(kinds) < 3 or kinds[0] not in _FILE_SYSTEMS:  # noqa: PLR2004 - proc(5)
            continue
        is_v2 = kinds[0] == "cgroup2"
        if is_v2 or controller in kinds[2].split(","):
            found.append((parts[4], parts[3], is_v2))
    return found


def _own_path(root: Path, process: str, controller: str) -> str | None:
    """Return a process's group in the hierarchy of this controller; version 2's one hierarchy names none."""
    for line in lines(root / "proc" / process / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return None
