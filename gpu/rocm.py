"""AMD cards from the kernel's own files: the KFD topology and the amdgpu driver's sysfs folder.

rocm-smi and amd-smi read the same files. Figures that only AMD's library has (the market name) are asked from pyrsmi in
a short-lived child process, see ``gpu.rocm_names``; where it is absent, nothing else changes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gpu import bounded
from gpu.card import Card, Fault, Probe, Vendor
from gpu.host import process_name
from gpu.kernel_files import number, text
from planner.types import ProcessUse
from planner.units import GIB

_NODES: Final = "sys/class/kfd/kfd/topology/nodes"
_LOOKED_FOR: Final = f"AMD: /{_NODES}"
TIMEOUT_S: Final = 5.0  # reading them takes a millisecond; a card that resets makes readers wait
MAX_NODES: Final = 256  # far above any machine: the walk over a folder of the kernel's is bounded all the same

# Ollama's rule for a part whose memory is the host's: a small carve-out beside a large share of system memory.
_APU_MAX_VRAM: Final = 4 * GIB
_APU_MIN_GTT: Final = 8 * GIB
_APU_GTT_PER_VRAM: Final = 4
_VRAM_TOTAL: Final = "mem_info_vram_total"
_LOCAL_HEAPS: Final = frozenset({1, 2})  # HSA_MEM_HEAP_TYPE_FB_PUBLIC and _PRIVATE


def probe(root: Path = Path("/"), *, can_open: bool | None = None, timeout_s: float = TIMEOUT_S) -> Probe:
    """Return this machine's AMD cards in KFD's order, which is HIP's. ``root`` and ``can_open`` are for tests.

    sysfs shows every card, also those that this process may not open, so access to the device files is asked for too.
    """
    nodes = root / _NODES
    try:
        numbers = sorted(int(entry.name) for entry in nodes.iterdir() if entry.name.isdigit())[:MAX_NODES]
    except OSError:
        return Probe(looked_for=(f"{_LOOKED_FOR} (not there)",), installed=False)
    found = bounded.ask(f"amd {root}", lambda: _cards(root, numbers, can_open=can_open), timeout_s)
    if found is not None:
        return found
    what = f"AMD: the driver's files gave no answer within {timeout_s:g} s"
    return Probe(faults=(Fault(what, "see the kernel log (dmesg | grep amdgpu); reboot"),), looked_for=(_LOOKED_FOR,))


def _cards(root: Path, numbers: Sequence[int], *, can_open: bool | None) -> Probe:
    nodes = root / _NODES
    cards: list[Card] = []
    faults: list[Fault] = []
    for node in (nodes / str(index) for index in numbers):
        properties = _properties(node / "properties")
        if properties.get("simd_count", 0) == 0:
            continue  # a CPU
        try:
            cards.append(_card(root, node, properties, can_open=can_open))
        except (OSError, ValueError) as error:
            what = f"AMD card of KFD node {node.name} is left out, its files cannot be read ({error})"
            faults.append(Fault(what, "see the kernel log (dmesg | grep amdgpu)"))
    # Partitions of one card can carry one id, which then names none of them.
    times = Counter(card.uuid for card in cards)
    told_apart = (replace(card, uuid=card.uuid if times[card.uuid] == 1 else None) for card in cards)
    return Probe(tuple(told_apart), tuple(faults), (_LOOKED_FOR,))


def _card(root: Path, node: Path, properties: dict[str, int], *, can_open: bool | None) -> Card:
    minor = properties.get("drm_render_minor", 0)
    pci = _pci_bus_id(properties)
    # A partition's render node has a folder without figures; the card's own is that of its address.
    own, of_card = root / f"sys/class/drm/renderD{minor}/device", root / f"sys/bus/pci/devices/{pci}"
    device = of_card if (of_card / _VRAM_TOTAL).exists() and not (own / _VRAM_TOTAL).exists() else own
    asleep = text(device / "power/runtime_status") == "suspended"
    memory = _sleeping(node) if asleep else _awake(device, properties)
    split = (text(device / "current_memory_partition") or "NPS1") != "NPS1"
    if split:
        # Each partition has a part of the memory; the folder's figures are the whole card's.
        memory = _Memory(_bank_bytes(node), None, None, unified=False)
    unique_id = properties.get("unique_id", 0)
    return Card(
        vendor=Vendor.AMD,
        name=("" if asleep else text(device / "product_name")) or f"AMD {_gfx(properties) or 'GPU'}",
        pci_bus_id=pci,
        uuid=f"GPU-{unique_id:016x}" if unique_id else None,
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        gtt_bytes=memory.gtt_bytes,
        bandwidth_bytes_per_s=_bandwidth(node),
        arch=_gfx(properties),
        unified=memory.unified,
        part_of=f"{pci}/{node.name}" if split else None,
        asleep=asleep,
        numa_node=None if asleep else number(device / "numa_node"),
        processes=_processes(root, number(node / "gpu_id")),
        why_not=_why_not(root, minor, can_open=can_open),
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    """A card's memory. VRAM and GTT (host memory that the driver lends) are never added up."""

    total_bytes: int | None
    free_bytes: int | None
    gtt_bytes: int | None
    unified: bool


def _awake(device: Path, properties: dict[str, int]) -> _Memory:
    vram_total, vram_used = number(device / _VRAM_TOTAL), number(device / "mem_info_vram_used")
    gtt_total, gtt_used = number(device / "mem_info_gtt_total"), number(device / "mem_info_gtt_used")
    unified = _is_unified(device, properties, vram_total, gtt_total)
    # HIP takes an APU's memory from the larger of the two.
    total, used = (gtt_total, gtt_used) if unified and (gtt_total or 0) > (vram_total or 0) else (vram_total, vram_used)
    free = None if total is None or used is None else max(total - used, 0)
    return _Memory(total, free, gtt_total, unified=unified)


def _sleeping(node: Path) -> _Memory:
    """Return what the topology says of a suspended card: reading its driver's files would wake it.

    It sleeps because nobody uses it, so all of its memory is free.
    """
    total = _bank_bytes(node)
    return _Memory(total, total, None, unified=False)


def _bank_bytes(node: Path) -> int | None:
    """Return the sizes of the node's banks of local memory together (heap types 1 and 2, kfd_topology.h)."""
    banks = [_properties(bank) for bank in sorted((node / "mem_banks").glob("*/properties"))]
    sizes = [bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type", 1) in _LOCAL_HEAPS]
    return sum(sizes) or None


def _is_unified(device: Path, properties: dict[str, int], vram: int | None, gtt: int | None) -> bool:
    """Say whether the card's memory is the host's: an APU has CPU cores on its node, or Ollama's rule holds."""
    if properties.get("cpu_cores_count", 0) > 0:
        return True
    if vram is None or gtt is None or (device / "board_info").exists() or (device / "mem_info_vram_vendor").exists():
        return False
    return vram <= _APU_MAX_VRAM and gtt >= _APU_MIN_GTT and gtt >= _APU_GTT_PER_VRAM * vram


def _why_not(root: Path, minor: int, *, can_open: bool | None) -> Fault | None:
    files = (root / "dev/kfd", root / f"dev/dri/renderD{minor}")
    refused = [f"/{file.relative_to(root)}" for file in files if not os.access(file, os.R_OK | os.W_OK)]
    if can_open or (can_open is None and not refused):
        return None
    return Fault(f"this process may not open {' and '.join(refused)}", "add its user to the groups render and video")


def _gfx(properties: dict[str, int]) -> str | None:
    """Return the ISA's name: decimal 110000 is gfx1100, 90010 is gfx90a (minor version and stepping in hex)."""
    version = properties.get("gfx_target_version", 0)
    if version == 0:
        return None
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _pci_bus_id(properties: dict[str, int]) -> str | None:
    location = properties.get("location_id")
    if location is None:
        return None
    return f"{properties.get('domain', 0):04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7:x}"


def _bandwidth(node: Path) -> int | None:
    """Return bytes per second of the node's widest memory bank: width in bits, clock in MHz, two transfers a clock."""
    found = []
    for bank in sorted((node / "mem_banks").glob("*/properties")):
        properties = _properties(bank)
        width, clock = properties.get("width", 0), properties.get("mem_clk_max", 0)
        found.append(2 * width * clock * 1_000_000 // 8)
    return max(found, default=0) or None


def _processes(root: Path, gpu_id: int | None) -> tuple[ProcessUse, ...]:
    """Return the ROCm processes that hold memory on the card (/sys/class/kfd/kfd/proc/PID/vram_GPUID)."""
    if gpu_id is None:
        return ()
    found = []
    for file in sorted((root / "sys/class/kfd/kfd/proc").glob(f"*/vram_{gpu_id}")):
        used = number(file)
        if file.parent.name.isdigit() and used:
            pid = int(file.parent.name)
            found.append(ProcessUse(pid, process_name(pid, root), used))
    return tuple(sorted(found, key=lambda process: process.pid))


def _properties(path: Path) -> dict[str, int]:
    rows = re.findall(r"^(\w+) ([0-9]{1,20})\s*$", text(path), re.MULTILINE)
    return {name: int(value) for name, value in rows}
