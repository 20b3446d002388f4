"""NVIDIA cards through NVML (``import pynvml``, from the nvidia-ml-py distribution).

A card that fails is one fault and the others go on; no driver at all is none. NVML creates no context, unlike
``llama-server --list-devices``, so it may be asked as often as one likes. Of a card that is divided (MIG) only the
parts are listed: no program can use the whole.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from gpu import bounded
from gpu.card import Card, Fault, Link, Probe, Vendor
from gpu.host import process_name
from gpu.kernel_files import lines
from planner.types import ProcessUse

LIBRARY: Final = "libnvidia-ml.so.1"
TIMEOUT_S: Final = 10.0  # without persistence mode a driver brings up each idle card first, in a second or two
_LOOKED_FOR: Final = (f"NVIDIA: {LIBRARY}",)

# NVML's return codes, as far as they decide what to do (nvml.h, nvmlReturn_t).
_NOT_SUPPORTED: Final = 3
_LIBRARY_NOT_FOUND: Final = 12
_TRANSIENT: Final = frozenset({10, 19, 27})  # timeout, in use, not ready: gone a moment later
_DRIVER_FAULTS: Final = {
    9: Fault(
        "NVIDIA: the driver is installed but not loaded",
        "load the module (sudo modprobe nvidia) or reboot; in a container, start it with its GPU flags (--gpus all)",
    ),
    18: Fault(
        "NVIDIA: the driver was upgraded but the old one is still loaded",
        "reboot or reload the module (sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia; sudo modprobe nvidia)",
    ),
}
_CARD_FAULTS: Final = {
    4: Fault(
        "this service may not open the card",
        "give it the card's device nodes (container: --gpus all; systemd: DeviceAllow=, groups video and render)",
    ),
    15: Fault("the card has fallen off the bus", "reboot; if it comes back, look at its power, seat and temperature"),
    16: Fault("the card needs a reset", "sudo nvidia-smi --gpu-reset, or reboot"),
}

# Parts whose memory is the host's: NVML has no memory figure for them, or one that is too small.
UNIFIED_NAMES: Final = re.compile(r"\b(GB10|N1X|Orin|Thor|Xavier|Tegra)\b")

# CUDA cores of one multiprocessor, by compute capability (CUDA C++ programming guide, arithmetic throughput).
_CORES_PER_MULTIPROCESSOR: Final = {"6.0": 64, "7.0": 64, "7.2": 64, "7.5": 64, "8.0": 64}
_CORES_PER_MULTIPROCESSOR_ELSE: Final = 128

EXCLUSIVE: Final = "exclusive"  # one process at a time
_PROHIBITED: Final = "prohibited"
_COMPUTE_MODES: Final = {0: "default", 2: _PROHIBITED, 3: EXCLUSIVE}  # nvml.h, nvmlComputeMode_t
_TO_DEFAULT: Final = "sudo nvidia-smi -c DEFAULT"
_CLOSED_TO_ALL: Final = Fault("its compute mode is prohibited, so no program can use it", _TO_DEFAULT)
_MIG_ENABLED: Final = 1
_MAX_NVLINKS: Final = 18  # NVML_NVLINK_MAX_LINKS

_NAMELESS: Final = "NVIDIA"  # every name that CUDA gives a card of today begins so
_UNKNOWN_MEMORY: Final = (None, None, None)

T = TypeVar("T")


def probe(timeout_s: float = TIMEOUT_S) -> Probe:
    """Return this machine's NVIDIA cards, in PCI order (that of ``CUDA_DEVICE_ORDER=PCI_BUS_ID``). Raises nothing."""
    try:
        ctypes.CDLL(LIBRARY)  # a millisecond; importing pynvml costs 25
    except OSError:
        return Probe(looked_for=(f"{_LOOKED_FOR[0]} (not installed)",), installed=False)
    with warnings.catch_warnings():
        # Where the deprecated pynvml distribution is installed too, its import hook warns.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            import pynvml  # noqa: PLC0415 - only a machine with NVIDIA's driver pays for it
        except ImportError:
            return _failed(Fault("NVIDIA: the nvidia-ml-py package is missing", "pip install nvidia-ml-py"))
    if not hasattr(pynvml, "nvmlMemory_v2"):
        what = f"NVIDIA: an old pynvml package ({pynvml.__file__}) stands before NVIDIA's own"
        return _failed(Fault(what, "pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py"))
    found = bounded.ask("nvml", lambda: _ask(pynvml), timeout_s)
    if found is not None:
        return found
    what = f"NVIDIA: the driver gave no answer within {timeout_s:g} s"
    return _failed(Fault(what, "see nvidia-smi and the kernel log (dmesg); a reboot ends a wedged driver"))


def is_loaded(root: Path = Path("/")) -> bool:
    """Say whether the kernel has NVIDIA's driver."""
    return (root / "proc/driver/nvidia").exists()


def is_asleep(root: Path = Path("/")) -> bool:
    """Say whether a card of NVIDIA's sleeps, as a notebook's does: NVML would wake every one of them."""
    states = (root / "sys/bus/pci/drivers/nvidia").glob("*/power/runtime_status")
    return any(lines(state) == ["suspended"] for state in states)


def _failed(fault: Fault) -> Probe:
    return Probe(faults=(fault,), looked_for=_LOOKED_FOR)


def _ask(pynvml: Any) -> Probe:
    try:
        pynvml.nvmlInit()
    except _failures(pynvml) as error:
        code = getattr(error, "value", 0)
        if code == _LIBRARY_NOT_FOUND:
            return Probe(looked_for=_LOOKED_FOR)
        return _failed(_DRIVER_FAULTS.get(code) or _unknown("NVIDIA", error))
    try:
        return _cards(pynvml)
    except _failures(pynvml) as error:
        return _failed(_unknown("NVIDIA", error))
    finally:
        _or_none(pynvml, pynvml.nvmlShutdown)


def _failures(pynvml: Any) -> tuple[type[Exception], ...]:
    """Return what an answer that cannot be had raises.

    That is NVML's own errors, a text that is none, and a function that an older nvidia-ml-py does not know.
    """
    return pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, UnicodeDecodeError, AttributeError


def _cards(pynvml: Any) -> Probe:
    cards: list[Card] = []
    faults: list[Fault] = []
    left_out: dict[Fault, list[str]] = {}
    driver = _or_none(pynvml, pynvml.nvmlSystemGetDriverVersion)
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            found = _card_or_parts(pynvml, index)
        except _failures(pynvml) as error:
            fault = _CARD_FAULTS.get(getattr(error, "value", 0)) or _unknown("it", error)
            left_out.setdefault(fault, []).append(str(index))
            continue
        if not found:
            what = f"NVIDIA card {index} is in MIG mode and has no instance"
            faults.append(
                Fault(what, f"make some (sudo nvidia-smi mig -i {index} -cgi ... -C) or turn MIG off (-mig 0)")
            )
        cards += (replace(card, driver=driver) for card in found)
    # One line for all cards with one fault: a container may be given four of nine.
    for fault, numbers in left_out.items():
        who = f"card {numbers[0]} is" if len(numbers) == 1 else f"cards {', '.join(numbers)} are"
        faults.append(Fault(f"NVIDIA {who} left out, {fault.what}", fault.fix))
    cards.sort(key=lambda card: _place(card.pci_bus_id))
    return Probe(tuple(cards), tuple(faults), _LOOKED_FOR)


def _place(pci_bus_id: str | None) -> list[int]:
    """Return what orders addresses as CUDA does: by their numbers, since a domain may have five digits."""
    return [int(part, 16) for part in re.split("[:.]", pci_bus_id)] if pci_bus_id else []


def _handle(pynvml: Any, index: int) -> Any:
    """Return a card's handle, asked for a second time where the first failure was one that passes."""
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        if error.value not in _TRANSIENT:
            raise
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def _card_or_parts(pynvml: Any, index: int) -> list[Card]:
    """Return the card or, where it is divided, its parts in order: only these can be used."""
    handle = _handle(pynvml, index)
    mode = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetMigMode(handle))
    divided = mode is not None and mode[0] == _MIG_ENABLED
    card = _card(pynvml, handle, divided=divided)
    if not divided:
        return [card]
    parts = []
    for number in range(_or_none(pynvml, lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError:
            continue  # an unused number: instances come and go, the others keep theirs
        parts.append(_part(pynvml, part, card))
    return parts


def _part(pynvml: Any, handle: Any, whole: Card) -> Card:
    """Return one MIG instance. A slice of the memory brings its share of the bus with it."""
    total, free, reserved = _or_none(pynvml, lambda: _memory(pynvml, handle)) or _UNKNOWN_MEMORY
    attributes = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetAttributes(handle))
    bandwidth = None
    if total and whole.total_bytes and whole.bandwidth_bytes_per_s:
        bandwidth = min(whole.bandwidth_bytes_per_s * total // whole.total_bytes, whole.bandwidth_bytes_per_s)
    return replace(
        whole,
        name=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetName(handle)) or whole.name,
        uuid=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetUUID(handle)),
        part_of=whole.uuid,
        total_bytes=total,
        free_bytes=free,
        reserved_bytes=reserved,
        bandwidth_bytes_per_s=bandwidth,
        multiprocessors=None if attributes is None else attributes.multiprocessorCount or None,
        processes=_processes(pynvml, handle),
    )


def _card(pynvml: Any, handle: Any, *, divided: bool) -> Card:
    """Return one card. Raises NVMLError only where the card as such fails, not where a figure is missing.

    Figures of a divided card as a whole may take privileges that nobody here needs.
    """
    name = _name(pynvml, handle)
    capability = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    arch = None if capability is None else f"{capability[0]}.{capability[1]}"
    if divided:
        total, free, reserved = _or_none(pynvml, lambda: _memory(pynvml, handle)) or _UNKNOWN_MEMORY
    else:
        total, free, reserved = _memory(pynvml, handle)
    unified = UNIFIED_NAMES.search(name) is not None
    if unified:
        total = free = None  # of a part of the host's memory, if anything
    mode = _or_none(pynvml, lambda: _COMPUTE_MODES.get(pynvml.nvmlDeviceGetComputeMode(handle)))
    display = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetDisplayActive(handle))
    return Card(
        vendor=Vendor.NVIDIA,
        name=name,
        pci_bus_id=_or_none(pynvml, lambda: _pci_bus_id(pynvml.nvmlDeviceGetPciInfo(handle))),
        uuid=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetUUID(handle)),
        total_bytes=total,
        free_bytes=free,
        reserved_bytes=reserved,
        bandwidth_bytes_per_s=_or_none(pynvml, lambda: _bandwidth(pynvml, handle)),
        arch=arch,
        multiprocessors=_or_none(pynvml, lambda: _multiprocessors(pynvml.nvmlDeviceGetNumGpuCores(handle), arch)),
        unified=unified,
        drives_display=None if display is None else bool(display),
        compute_mode=mode,
        numa_node=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetNumaNodeId(handle)),
        link=_link(pynvml, handle),
        processes=_processes(pynvml, handle),
        why_not=_CLOSED_TO_ALL if mode == _PROHIBITED else None,
    )


def unless_taken(card: Card, ours: frozenset[int]) -> Card:
    """Return the card, closed to us where it takes one process at a time and has one that is none of ``ours``."""
    holder = next((process for process in card.processes if process.pid not in ours), None)
    if card.compute_mode != EXCLUSIVE or holder is None:
        return card
    what = f"its compute mode is exclusive and process {holder.pid} ({holder.name or 'unknown'}) has it"
    return replace(card, why_not=Fault(what, f"end that, or {_TO_DEFAULT}"))


def _or_none(pynvml: Any, call: Callable[[], T]) -> T | None:
    """Return the answer, or None where this driver or card has none. A missing figure never loses a card."""
    try:
        return call()
    except _failures(pynvml):
        return None


def _name(pynvml: Any, handle: Any) -> str:
    """Return the card's name. Raises NVMLError only for a card that is gone or closed to us."""
    try:
        return str(pynvml.nvmlDeviceGetName(handle)) or _NAMELESS
    except _failures(pynvml) as error:
        if getattr(error, "value", None) in _CARD_FAULTS:
            raise
    return _NAMELESS


def _memory(pynvml: Any, handle: Any) -> tuple[int | None, int | None, int | None]:
    """Return total without what the driver reserves, free, and reserved. None where NVML has no figure (unified parts).

    The first version of the call counts the reserved bytes as used, the second apart; free is the same in both.
    """
    info = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    reserved = None if info is None else info.reserved
    if info is None:
        try:
            info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError as error:
            if error.value == _NOT_SUPPORTED:
                return _UNKNOWN_MEMORY
            raise
    total = info.total - (reserved or 0)
    return (total, min(info.free, total), reserved) if total > 0 else _UNKNOWN_MEMORY


def _pci_bus_id(pci: Any) -> str:
    """Return ggml's device id (ggml-cuda.cu, ggml_backend_cuda_reg): ``0000:01:00.0``, in lower case."""
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _bandwidth(pynvml: Any, handle: Any) -> int:
    """Return bytes per second: two transfers a clock at the highest memory clock over the whole bus."""
    clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    bus_bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
    return int(2 * clock_mhz * 1_000_000 * bus_bits // 8)


def _link(pynvml: Any, handle: Any) -> Link:
    return Link(
        pcie_generation=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        pcie_lanes=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        pcie_lanes_max=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        nvlink_peers=_nvlink_peers(pynvml, handle),
    )


def _nvlink_peers(pynvml: Any, handle: Any) -> tuple[str, ...]:
    """Return who is at the other ends of the links that are up; most cards have none and say so at the first."""
    peers: set[str] = set()
    try:
        for link in range(_MAX_NVLINKS):
            if pynvml.nvmlDeviceGetNvLinkState(handle, link):
                peers.add(_pci_bus_id(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link)))
    except _failures(pynvml):
        pass  # beyond the last link
    return tuple(sorted(peers))


def _multiprocessors(cores: int, arch: str | None) -> int | None:
    if not cores or arch is None:
        return None
    return cores // _CORES_PER_MULTIPROCESSOR.get(arch, _CORES_PER_MULTIPROCESSOR_ELSE)


def _processes(pynvml: Any, handle: Any) -> tuple[ProcessUse, ...]:
    """Return who holds memory on the card, by the driver's pids: in a container they may be another namespace's."""
    running = [
        *(_or_none(pynvml, lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()),
        *(_or_none(pynvml, lambda: pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)) or ()),
    ]
    by_pid = {process.pid: process.usedGpuMemory for process in running}
    return tuple(ProcessUse(pid, process_name(pid), used) for pid, used in sorted(by_pid.items()))


def _unknown(who: str, error: Any) -> Fault:
    # An NVMLError can be neither hashed nor compared with None; its text and its number are safe.
    code = getattr(error, "value", None)
    return Fault(f"{who}: NVML answers {str(error)!r}" + ("" if code is None else f" (code {code})"), "see nvidia-smi")
