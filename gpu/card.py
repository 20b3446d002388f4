"""What a vendor's own library says of one card, before llama-server has given it a name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.types import ProcessUse
from planner.units import MIB


class Vendor(StrEnum):
    """Whose driver was asked."""

    NVIDIA = "nvidia"
    AMD = "amd"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong, and what mends it: together one line."""

    what: str
    fix: str

    def __str__(self) -> str:
        """Return the line."""
        return f"{self.what}: {self.fix}"


@dataclass(frozen=True, slots=True)
class Link:
    """How a card is connected: PCIe at the speed that it can have (an idle link slows down), over the lanes it has now.

    ``nvlink_peers`` are the PCI addresses at the other ends of its NVLinks.
    """

    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    pcie_lanes_max: int | None = None
    nvlink_peers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Card:
    """One physical GPU, or one part of it; no two are equal, since parts of one card can look alike.

    ``total_bytes`` leaves out what the driver reserves, as ``free_bytes`` does.
    ``unified`` says that its memory is the host's. ``arch`` is a compute capability (``8.9``) or a gfx name
    (``gfx1100``). ``why_not`` says why no program of ours can use it at this moment. ``part_of`` says of
    what this is a part with memory of its own. ``asleep``: it was not asked, since that would wake it.
    ``gtt_bytes`` is host memory that AMD's driver lends the card, never added to its own.
    """

    vendor: Vendor
    name: str
    pci_bus_id: str | None
    uuid: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    reserved_bytes: int | None = None
    gtt_bytes: int | None = None
    bandwidth_bytes_per_s: int | None = None
    arch: str | None = None
    multiprocessors: int | None = None
    unified: bool = False
    part_of: str | None = None
    asleep: bool = False
    drives_display: bool | None = None
    compute_mode: str | None = None
    driver: str | None = None
    numa_node: int | None = None
    link: Link = Link()
    processes: tuple[ProcessUse, ...] = ()
    why_not: Fault | None = None

    @property
    def pool(self) -> str | None:
        """Return what tells its memory from every other: parts with memory of their own share an address."""
        if self.part_of is not None:
            return self.uuid or self.part_of
        return self.pci_bus_id or self.uuid


@dataclass(frozen=True, slots=True)
class Probe:
    """What one library found, in its own order, what went wrong, and where was looked.

    ``installed``: whether the vendor's driver is there at all.
    """

    cards: tuple[Card, ...] = ()
    faults: tuple[Fault, ...] = ()
    looked_for: tuple[str, ...] = ()
    installed: bool = True

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return one line for each fault."""
        return tuple(map(str, self.faults))


# Measured with cudaMemGetInfo for a bare context: 107 MiB on 34 multiprocessors (RTX 4060 Ti), 555 MiB on 188
# (RTX PRO 6000), both reported with llama.cpp pull request 23604; a line through the two. Newer drivers lie above it.
_CONTEXT_MIB_AT_LEAST: Final = 110
_CONTEXT_MIB_BASE: Final = 10.0
_CONTEXT_MIB_PER_MULTIPROCESSOR: Final = 2.9
# The cuBLAS workspace that ggml-cuda sets for each device on first use (ggml-cuda/common.cuh): more from Hopper on.
_CUBLAS_MIB: Final = 4
_CUBLAS_MIB_HOPPER: Final = 32
_HOPPER: Final = 9.0
# ggml-cuda's pool of temporaries grows with the first long prompt and is never given back. Quantized activations of
# 512 tokens take tens of MiB; this is an allowance for them, not a measurement.
_POOL_MIB: Final = 128


def cuda_overhead_bytes(arch: str | None, multiprocessors: int | None) -> int | None:
    """Return what one llama-server process takes on this card beyond what llama.cpp's memory breakdown reports.

    That is the driver's context, the workspace of its libraries and ggml's pool. None where the card's size is not
    known: then ``planner.budget.OVERHEAD_BYTES`` has the rule, as for every other kind of device.
    """
    if arch is None or multiprocessors is None:
        return None
    by_size = round(_CONTEXT_MIB_BASE + _CONTEXT_MIB_PER_MULTIPROCESSOR * multiprocessors)
    cublas = _CUBLAS_MIB_HOPPER if float(arch) >= _HOPPER else _CUBLAS_MIB
    return (max(_CONTEXT_MIB_AT_LEAST, by_size) + cublas + _POOL_MIB) * MIB
