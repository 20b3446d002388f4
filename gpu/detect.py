"""Merges what the vendors' libraries, the kernel, the RPC workers and llama-server itself say into one ``Machine``.

Names and order are llama-server's, since its command line uses them; free memory is the smallest trusted figure. A GPU
that the chosen llama-server cannot use stays in the list, marked and explained, and is warned about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gpu import host, llama, nvml, rocm
from gpu.card import Card, Fault, Probe, Vendor, cuda_overhead_bytes
from gpu.llama import ListedDevice, Search, Server
from gpu.matching import match, unmatched
from gpu.rpc import Worker
from gpu.rpc_devices import RpcDevices, RpcServer, ask_workers, rpc_devices
from planner.types import HOST_POOL, Device, DeviceKind, DeviceName, Machine, MemoryPool, PoolId

Environ = Mapping[str, str]

_KIND: Final = {Vendor.NVIDIA: DeviceKind.CUDA, Vendor.AMD: DeviceKind.ROCM}
_NAME: Final = {Vendor.NVIDIA: "CUDA", Vendor.AMD: "ROCm"}
# What Vulkan and SYCL call parts without memory of their own, and what renders on the CPU; no library of ours knows
# them. Intel's discrete cards have a letter before their number (A770, B580), AMD's have RX or Pro.
_INTEGRATED_NAMES: Final = re.compile(
    r"Intel\(R\) (?:U?HD |Iris|Graphics(?! \((?:BMG|DG))|Arc\(TM\) (?:Graphics|[0-9]{3}[A-Z]\b))"
    r"|Radeon(?:\(TM\))? (?:(?!Pro\b)[\w ]+ )?Graphics|Radeon(?:\(TM\))? [0-9]{3,4}[MS]\b|AMD Custom GPU"
    r"|llvmpipe|Adreno|Mali",
    re.IGNORECASE,
)
_BESIDE_DISCRETE: Final = Fault(
    "it shares the host's memory and a discrete GPU does not", "it is left out unless --device names it"
)
_BACKEND: Final = {Vendor.NVIDIA: ("cuda", "cuda"), Vendor.AMD: ("rocm", "hip")}  # our word, BACKEND='s word


@dataclass(frozen=True, slots=True)
class Detected:
    """The machine, the llama-server that plans for it are launched with, and what each source said.

    ``cards`` are the cards behind the devices, by the devices' names; ``left_idle`` is why devices are not used that
    could be, by name. ``machine_key`` says which cards and drivers there are, on which llama-server's own list depends.
    """

    machine: Machine
    llama: Search
    nvidia: Probe
    amd: Probe
    memory: host.HostMemory
    of_workers: RpcDevices
    cards: Mapping[str, Card]
    left_idle: Mapping[str, Fault]
    machine_key: tuple[str, ...]

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Return the RPC workers that were asked."""
        return self.of_workers.workers


def detect(  # noqa: PLR0913 - what callers may know of the machine beforehand, each by its name
    environ: Environ,
    *,
    llama_server: Path | None = None,
    rpc_servers: Sequence[RpcServer] = (),
    leased: frozenset[str] = frozenset(),
    insist: frozenset[str] = frozenset(),
    previous: Detected | None = None,
    known: Machine | None = None,
    owner: int | None = None,
    named: Container[str] = (),
    lightly: bool = False,
    root: Path = Path("/"),
) -> Detected:
    """Return this machine as llama-server will see it. Raises nothing: what cannot be read is a warning.

    ``leased`` are endpoints of RPC workers that runners of ours hold: they are not probed (a worker serves one client),
    their devices are taken over from ``known``, the machine as it was last told (None: that of ``previous``). With
    ``previous`` the llama-server found then is kept, unless cards came or went since: it is asked again what it lists;
    and workers that kept silent then are left alone for a while, but for those that the caller does ``insist`` on.
    ``owner`` is the process whose runners' mapped weights are not to be counted as available, and which may use a card
    that takes one process at a time and has one of them. ``named`` are devices that the user asked for by name, to be
    used even where llama.cpp would leave them out.

    ``lightly``: only drivers and the kernel are asked, neither llama-server nor workers, whose figures and warnings
    stay those of ``previous``; but where cards came or went it is a look like any other, and where a card sleeps that
    would be woken nobody is asked at all.
    """
    if previous is not None and lightly and nvml.is_asleep(root):
        return previous
    nvidia, amd = _nvidia(previous, root), rocm.probe(root)
    ours = frozenset[int]() if owner is None else host.runners(owner, root)
    cards = (*(nvml.unless_taken(card, ours) for card in nvidia.cards), *amd.cards)
    machine_key = _machine_key(cards, root)
    search = _found_before(previous, machine_key)
    if search is None:
        lightly = False
        n_gpus = _n_gpus(cards, root)
        search = llama.find(environ, configured=llama_server, n_gpus=n_gpus, machine_key=machine_key, root=root)
    protocol, before = search.build.rpc_protocol, () if previous is None else previous.workers
    asked = () if lightly else ask_workers(rpc_servers, protocol=protocol, leased=leased, before=before, insist=insist)
    # Only now: a worker of this machine answers once it has given back what its last client held.
    memory = host.read(root).without(host.mapped_bytes(ours, root))
    server = search.server if lightly else _with_free(search.server, cards, environ, machine_key)
    local, by_name, left_idle = _local_devices(cards, server, memory, environ, named)
    idle = (f"{one.name} ({one.description}) is left idle: {one.why_not}" for one in local if one.why_not)
    if previous is not None and lightly:
        local, workers = _as_before(previous, local), previous.of_workers
    else:
        told = previous.machine if known is None and previous is not None else known
        workers = rpc_devices(rpc_servers, asked, protocol=protocol, memory=memory, known=told)
    devices = (*workers.devices, *local, *workers.absent)
    machine = Machine(
        devices=devices,
        host=memory.device(),
        pools=_pools(devices, by_name, (memory.pool(), *workers.pools)),
        warnings=(*nvidia.warnings, *amd.warnings, *idle, *workers.warnings),
        looked_for=(*nvidia.looked_for, *amd.looked_for, *_looked_for(search, rpc_servers)),
    )
    return Detected(machine, search, nvidia, amd, memory, workers, by_name, left_idle, machine_key)


def _nvidia(previous: Detected | None, root: Path) -> Probe:
    """Return NVIDIA's cards; where there was no library of its driver's, and none was loaded since, as before: none."""
    if previous is None or previous.nvidia.installed or nvml.is_loaded(root):
        return nvml.probe()
    return previous.nvidia


def _found_before(previous: Detected | None, machine_key: tuple[str, ...]) -> Search | None:
    """Return the search of before without its figures; None where it found nothing, or cards came or went since."""
    if previous is None or previous.llama.server is None or previous.machine_key != machine_key:
        return None
    return replace(previous.llama, server=previous.llama.server.without_free())


def _n_gpus(cards: Sequence[Card], root: Path) -> int:
    """Return how many GPUs llama-server may find: those of the drivers, else those that the kernel draws with."""
    return sum(card.why_not is None for card in cards) or len(list((root / "dev/dri").glob("renderD*")))


def _as_before(previous: Detected, local: Sequence[Device]) -> tuple[Device, ...]:
    """Return the devices with the figures of before for those of which no driver tells what is free."""
    known = {device.name: device.free_bytes for device in previous.machine.devices}
    return tuple(
        replace(device, free_bytes=known.get(device.name)) if device.free_bytes is None else device for device in local
    )


def _looked_for(search: Search, rpc_servers: Sequence[RpcServer]) -> tuple[str, ...]:
    workers = tuple(f"RPC: {server.endpoint}" for server in rpc_servers) or ("RPC: no RPC_SERVERS set",)
    return (*(f"llama-server: {line}" for line in search.tried), *workers)


def _machine_key(cards: Sequence[Card], root: Path) -> tuple[str, ...]:
    """Return what a cached device list depends on beside the binary: the cards and their drivers."""
    drivers = []
    for file in ("proc/driver/nvidia/version", "sys/module/amdgpu/version", "proc/sys/kernel/osrelease"):
        try:
            drivers.append((root / file).read_text(encoding="utf-8", errors="replace").strip())
        except OSError:
            drivers.append("")
    nodes = sorted(node.name for node in (root / "dev/dri").glob("renderD*"))
    return (*drivers, *nodes, *(f"{card.uuid or card.pci_bus_id}" for card in cards))


def _with_free(
    server: Server | None, cards: Sequence[Card], environ: Environ, machine_key: Sequence[str]
) -> Server | None:
    """Return the server, asked anew where nobody else knows what is free on its devices and its answer is old."""
    if server is None or not any(
        device.free_bytes is None and _nobody_knows_free(card) for device, card in match(server.listed, cards, environ)
    ):
        return server
    return llama.refresh(server, environ, machine_key=machine_key)


def _local_devices(
    cards: Sequence[Card], server: Server | None, memory: host.HostMemory, environ: Environ, named: Container[str]
) -> tuple[tuple[Device, ...], dict[str, Card], dict[str, Fault]]:
    """Return the devices of this machine, the cards behind them, and why cards that work are not used: by name."""
    matched = match(server.listed if server else (), cards, environ)
    shares = Counter(card for _, card in matched if card is not None)
    devices = [_device(device, card, memory, n_shares=shares[card] if card else 1) for device, card in matched]
    left_idle = dict.fromkeys(_beside_discrete(devices, named), _BESIDE_DISCRETE)
    devices = [_idle(each, _BESIDE_DISCRETE) if each.name in left_idle else each for each in devices]
    by_name = {device.name: card for device, card in matched if card is not None}
    names = {device.name for device in devices}
    for card in _with_names(unmatched(matched, cards), environ):
        device = _unlisted(card, names, memory)
        why_not = card.why_not or _why_unlisted(card, server)
        if card.why_not is None:
            left_idle[device.name] = why_not
        names.add(device.name)
        by_name[device.name] = card
        devices.append(_idle(device, why_not))
    return tuple(devices), by_name, left_idle


def _idle(device: Device, why_not: Fault) -> Device:
    return replace(device, usable=False, why_not=str(why_not))


def _nobody_knows_free(card: Card | None) -> bool:
    return card is None or (card.free_bytes is None and not card.unified)


def _with_names(cards: Sequence[Card], environ: Environ) -> tuple[Card, ...]:
    """Give AMD's cards the names that only AMD's library knows, where llama-server does not say them."""
    if not any(card.vendor is Vendor.AMD for card in cards):
        return tuple(cards)
    from gpu import rocm_names  # noqa: PLC0415 - only a machine with idle AMD cards starts the child

    known = rocm_names.ask(environ)
    return tuple(replace(card, name=known.get(card.pci_bus_id or "", {}).get("name") or card.name) for card in cards)


def _device(listed: ListedDevice, card: Card | None, memory: host.HostMemory, *, n_shares: int) -> Device:
    """Return a listed device, one of ``n_shares`` on its card. Of two figures the smaller one is true.

    HIP does not see what other programs hold, NVML not that a device is a part of its card.
    """
    if card is None:
        return _unknown_device(listed, memory)
    device = _card_device(listed.name, listed.kind, card, memory)
    free, listed_free = device.free_bytes, listed.free_bytes
    if free is not None and n_shares > 1:
        free //= n_shares  # as llama.cpp does (ggml_backend_cuda_device_get_memory)
    if card.unified and memory.has_hugepages:
        # There llama.cpp takes the free hugepages for all that is free (ggml_backend_cuda_get_available_uma_memory),
        # though it allocates none of them.
        listed_free = None
    return replace(
        device,
        total_bytes=_smallest(device.total_bytes, listed.total_bytes),
        free_bytes=_smallest(free, listed_free, listed.total_bytes if free is not None else None),
        description=listed.description,
        # Several devices on one card (GGML_CUDA_DEVICES) cannot be named by its UUID: their numbers tell them apart.
        uuid=device.uuid if n_shares == 1 else None,
        usable=card.why_not is None,
        why_not=None if card.why_not is None else str(card.why_not),
    )


def _unknown_device(listed: ListedDevice, memory: host.HostMemory) -> Device:
    """Return a device that only llama-server knows."""
    unified = any(names.search(listed.description) for names in (_INTEGRATED_NAMES, nvml.UNIFIED_NAMES))
    return Device(
        name=DeviceName(listed.name),
        kind=listed.kind,
        total_bytes=_smallest(listed.total_bytes, memory.total_bytes) if unified else listed.total_bytes,
        free_bytes=_smallest(listed.free_bytes, memory.available_bytes) if unified else listed.free_bytes,
        pool=HOST_POOL if unified else PoolId(listed.name),
        description=listed.description,
    )


def _beside_discrete(devices: Sequence[Device], named: Container[str]) -> list[str]:
    """Return the integrated GPUs beside discrete ones that are not named: llama.cpp leaves them out too.

    (llama_prepare_model_devices.) Layers there are no faster than on the CPU and take the same memory.
    """
    if all(device.pool == HOST_POOL or not device.usable for device in devices):
        return []
    return [each.name for each in devices if each.usable and each.pool == HOST_POOL and each.name not in named]


def _smallest(*figures: int | None) -> int | None:
    return min((figure for figure in figures if figure is not None), default=None)


def _card_device(name: str, kind: DeviceKind, card: Card, memory: host.HostMemory) -> Device:
    total, free = card.total_bytes, card.free_bytes
    if card.unified:
        # Its memory is the host's: never more than the host can give, and counted once, in the host's pool.
        total = memory.total_bytes if total is None else min(total, memory.total_bytes)
        free = memory.available_bytes if free is None else min(free, memory.available_bytes)
    return Device(
        name=DeviceName(name),
        kind=kind,
        total_bytes=total,
        free_bytes=free,
        pool=HOST_POOL if card.unified else PoolId(card.pool or name),
        description=card.name,
        uuid=card.uuid,
        pci_bus_id=card.pci_bus_id,
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
        compute_capability=card.arch,
        overhead_bytes=cuda_overhead_bytes(card.arch, card.multiprocessors) if kind is DeviceKind.CUDA else None,
        processes=card.processes,
        exclusive=card.compute_mode == nvml.EXCLUSIVE,
    )


def _unlisted(card: Card, names: set[DeviceName], memory: host.HostMemory) -> Device:
    """Return a card that llama-server does not list, as a device with the next free name."""
    prefix = _NAME[card.vendor]
    number = next(n for n in range(len(names) + 1) if f"{prefix}{n}" not in names)
    return _card_device(f"{prefix}{number}", _KIND[card.vendor], card, memory)


def _why_unlisted(card: Card, server: Server | None) -> Fault:
    backend, word = _BACKEND[card.vendor]
    build = f"build one with {llama.BUILD_COMMAND} BACKEND={word}"
    if server is None:
        return Fault("no llama-server found", build)
    path = server.build.path
    if card.part_of is not None and card.vendor is Vendor.NVIDIA and backend in server.build.backends:
        fix = f"choose this one instead with CUDA_VISIBLE_DEVICES={card.uuid}"
        return Fault("CUDA shows a process one MIG instance", fix)
    if backend in server.build.backends:
        hidden = "CUDA_VISIBLE_DEVICES" if card.vendor is Vendor.NVIDIA else "ROCR_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES"
        return Fault(f"{path} does not list it", f"check {hidden} and run {path} --list-devices")
    return Fault(f"{path} was built without {backend.upper()}", build)


def _pools(devices: Sequence[Device], cards: Mapping[str, Card], told: Sequence[MemoryPool]) -> tuple[MemoryPool, ...]:
    """Return each pool once: those that were told, and of every other what its card says or else the only device."""
    pools = {pool.id: pool for pool in told}
    members = Counter(device.pool for device in devices)
    for device in devices:
        card = cards.get(device.name)
        # Of several devices on one card each has its share; the pool is the whole.
        whole = device if card is None or members[device.pool] == 1 else card
        pools.setdefault(device.pool, MemoryPool(device.pool, whole.total_bytes, whole.free_bytes))
    return tuple(pools.values())
