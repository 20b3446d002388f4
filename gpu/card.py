"""What a vendor's own library says of one card, before llama-server has given it a name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.types import DeviceKind, ProcessUse
from planner.units import GIB, MIB


class Vendor(StrEnum):
    """Whose driver was asked."""

    NVIDIA = "nvidia"
    AMD = "amd"


@dataclass(frozen=True, slots=True)
class Card:
    """One physical GPU. ``total_bytes`` leaves out what the driver reserves, as ``free_bytes`` does.

    ``unified`` says that its memory is the host's. ``arch`` is a compute capability (``8.9``) or a gfx name
    (``gfx1100``). ``why_not`` says why no program of ours can use it at this moment.
    """

    vendor: Vendor
    name: str
    pci_bus_id: str | None
    uuid: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    bandwidth_bytes_per_s: int | None = None
    arch: str | None = None
    multiprocessors: int | None = None
    unified: bool = False
    processes: tuple[ProcessUse, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """What one library found, in its own order, one line for each thing that went wrong, and where was looked."""

    cards: tuple[Card, ...] = ()
    warnings: tuple[str, ...] = ()
    looked_for: tuple[str, ...] = ()


# Measured with cudaMemGetInfo for a bare context: 107 MiB on 34 multiprocessors (RTX 4060 Ti), 555 MiB on 188
# (RTX PRO 6000), both reported with llama.cpp pull request 23604; a line through the two. Newer drivers lie above it.
_CONTEXT_MIB_AT_LEAST: Final = 110
_CONTEXT_MIB_BASE: Final = 10.0
_CONTEXT_MIB_PER_MULTIPROCESSOR: Final = 2.9
# Where the number of multiprocessors is unknown: by size of the card, erring upwards.
_CONTEXT_MIB_BY_SIZE: Final = ((24 * GIB, 300), (48 * GIB, 450))
_CONTEXT_MIB_OF_THE_LARGEST: Final = 600
# The cuBLAS workspace that ggml-cuda sets for each device on first use (ggml-cuda/common.cuh): more from Hopper on.
_CUBLAS_MIB: Final = 4
_CUBLAS_MIB_HOPPER: Final = 32
_HOPPER: Final = 9.0
# About 0.4 GiB stayed unexplained on a 7900 XTX with two unrelated models.
_HIP_MIB: Final = 400
# Reported between 100 and 200 MiB for Vulkan; other backends have no figure and are treated alike.
_OTHER_MIB: Final = 200


def overhead_bytes(
    kind: DeviceKind, *, total_bytes: int | None, arch: str | None = None, multiprocessors: int | None = None
) -> int:
    """Return what one llama-server process takes on a device beyond what llama.cpp's memory breakdown reports.

    That is the driver's context and the workspace of its libraries. 0 for RPC workers (their context exists before we
    come, so their free figure leaves it out) and for the host. Where each number comes from stands at the constants;
    a measurement of the real card is better than any of them.
    """
    if kind in {DeviceKind.RPC, DeviceKind.HOST}:
        return 0
    if kind is DeviceKind.ROCM:
        return _HIP_MIB * MIB
    if kind is not DeviceKind.CUDA:
        return _OTHER_MIB * MIB
    if multiprocessors is not None:
        context_mib = max(
            _CONTEXT_MIB_AT_LEAST, round(_CONTEXT_MIB_BASE + _CONTEXT_MIB_PER_MULTIPROCESSOR * multiprocessors)
        )
    else:
        by_size = (mib for limit, mib in _CONTEXT_MIB_BY_SIZE if total_bytes is not None and total_bytes <= limit)
        context_mib = next(by_size, _CONTEXT_MIB_OF_THE_LARGEST)
    hopper = arch is None or float(arch) >= _HOPPER
    return (context_mib + (_CUBLAS_MIB_HOPPER if hopper else _CUBLAS_MIB)) * MIB
