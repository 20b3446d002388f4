"""NVIDIA cards through NVML (``import pynvml``, from the nvidia-ml-py distribution).

A card that fails is one warning and the others go on; no driver at all is no warning. NVML creates no context, unlike
``llama-server --list-devices``, so it may be asked as often as one likes.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Callable
from typing import Any, Final, TypeVar

from gpu.card import Card, Probe, Vendor
from gpu.host import process_name
from planner.types import ProcessUse

LIBRARY: Final = "libnvidia-ml.so.1"
TIMEOUT_S: Final = 15.0  # without persistence mode a driver brings up each idle card first, in seconds
_LOOKED_FOR: Final = (f"NVIDIA: {LIBRARY}",)

# NVML's return codes, as far as they decide what to do (nvml.h, nvmlReturn_t).
_NOT_SUPPORTED: Final = 3
_LIBRARY_NOT_FOUND: Final = 12
_RM_VERSION_MISMATCH: Final = 18
_ADVICE: Final = {
    9: "the NVIDIA driver is installed but not loaded: load the module (modprobe nvidia) or reboot",
    _RM_VERSION_MISMATCH: "the NVIDIA driver was upgraded but the old one is still loaded: reboot or reload its module",
}
_CARD_ADVICE: Final = {
    4: "no permission: this service may not open the card (device nodes, container or cgroup)",
    15: "the card has fallen off the bus: reboot",
    16: "the card needs a reset (nvidia-smi --gpu-reset)",
}

# Parts whose memory is the host's: NVML has no memory figure for them, or one that is too small.
_UNIFIED_NAMES: Final = re.compile(r"\b(GB10|N1X|Orin|Thor|Xavier|Tegra)\b")

# CUDA cores of one multiprocessor, by compute capability (CUDA C++ programming guide, arithmetic throughput).
_CORES_PER_MULTIPROCESSOR: Final = {"6.0": 64, "7.0": 64, "7.2": 64, "7.5": 64, "8.0": 64}
_CORES_PER_MULTIPROCESSOR_ELSE: Final = 128

T = TypeVar("T")


def probe(timeout_s: float = TIMEOUT_S) -> Probe:
    """Return this machine's NVIDIA cards, in PCI order (that of ``CUDA_DEVICE_ORDER=PCI_BUS_ID``). Raises nothing."""
    try:
        ctypes.CDLL(LIBRARY)  # a millisecond; importing pynvml costs 25
    except OSError:
        return Probe(looked_for=(f"{_LOOKED_FOR[0]} (not installed)",))
    with warnings.catch_warnings():
        # Where the deprecated pynvml distribution is installed too, its import hook warns.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            import pynvml  # noqa: PLC0415 - only a machine with NVIDIA's driver pays for it
        except ImportError:
            return Probe(warnings=("NVIDIA: the nvidia-ml-py package is missing",), looked_for=_LOOKED_FOR)
    # A wedged driver blocks in the kernel, where nothing can interrupt it: then its thread is left behind.
    from queue import Empty, SimpleQueue  # noqa: PLC0415 - as pynvml, for machines with NVIDIA's driver only
    from threading import Thread  # noqa: PLC0415

    answers: SimpleQueue[Probe] = SimpleQueue()
    Thread(target=lambda: answers.put(_ask(pynvml)), name="nvml", daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except Empty:
        line = f"NVIDIA: the driver gave no answer within {timeout_s:g} s; see nvidia-smi and the kernel log"
        return Probe(warnings=(line,), looked_for=_LOOKED_FOR)


def _ask(pynvml: Any) -> Probe:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == _LIBRARY_NOT_FOUND:
            return Probe(looked_for=_LOOKED_FOR)
        return Probe(warnings=(f"NVIDIA: {_ADVICE.get(error.value, _words(error))}",), looked_for=_LOOKED_FOR)
    try:
        return _cards(pynvml)
    except pynvml.NVMLError as error:
        return Probe(warnings=(f"NVIDIA: {_words(error)}",), looked_for=_LOOKED_FOR)
    finally:
        _or_none(pynvml, pynvml.nvmlShutdown)


def _cards(pynvml: Any) -> Probe:
    cards: list[Card] = []
    problems: list[str] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            cards.append(_card(pynvml, handle))
        except pynvml.NVMLError as error:
            problems.append(f"NVIDIA card {index}: {_CARD_ADVICE.get(error.value, _words(error))}; it is left out")
    cards.sort(key=lambda card: card.pci_bus_id or "")
    return Probe(tuple(cards), tuple(problems), _LOOKED_FOR)


def _card(pynvml: Any, handle: Any) -> Card:
    """Return one card. Raises NVMLError only where the card as such fails, not where a figure is missing."""
    name = pynvml.nvmlDeviceGetName(handle)
    capability = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    arch = None if capability is None else f"{capability[0]}.{capability[1]}"
    total, free = _memory(pynvml, handle)
    return Card(
        vendor=Vendor.NVIDIA,
        name=name,
        pci_bus_id=_or_none(pynvml, lambda: _pci_bus_id(pynvml.nvmlDeviceGetPciInfo(handle))),
        uuid=_or_none(pynvml, lambda: pynvml.nvmlDeviceGetUUID(handle)),
        total_bytes=total,
        free_bytes=free,
        bandwidth_bytes_per_s=_or_none(pynvml, lambda: _bandwidth(pynvml, handle)),
        arch=arch,
        multiprocessors=_or_none(pynvml, lambda: _multiprocessors(pynvml.nvmlDeviceGetNumGpuCores(handle), arch)),
        unified=_UNIFIED_NAMES.search(name) is not None,
        processes=_processes(pynvml, handle),
    )


def _or_none(pynvml: Any, call: Callable[[], T]) -> T | None:
    """Return the answer, or None where this driver or card has none. A missing figure never loses a card."""
    try:
        return call()
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return None


def _memory(pynvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """Return total without what the driver reserves, and free. Both None where NVML has no figure (unified parts).

    The first version of the call counts the reserved bytes as used, the second apart; free is the same in both.
    """
    info = _or_none(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2))
    if info is not None:
        return info.total - info.reserved, info.free
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        if error.value == _NOT_SUPPORTED:
            return None, None
        raise
    return info.total, info.free


def _pci_bus_id(pci: Any) -> str:
    """Return ggml's device id (ggml-cuda.cu, ggml_backend_cuda_reg): ``0000:01:00.0``, in lower case."""
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _bandwidth(pynvml: Any, handle: Any) -> int:
    """Return bytes per second: two transfers a clock at the highest memory clock over the whole bus."""
    clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    bus_bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
    return int(2 * clock_mhz * 1_000_000 * bus_bits // 8)


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


def _words(error: Any) -> str:
    # An NVMLError can be neither hashed nor compared with None; its text and its number are safe.
    return f"NVML answers {str(error)!r} (code {error.value})"
