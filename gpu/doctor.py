"""``planner doctor``: what commonly goes wrong on a machine that serves models, each with what mends it.

``examine`` is a function of ``gpu.facts.Facts`` alone. A finding is ``wrong`` where models are served worse than this
machine could or not at all, else a note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from gpu.card import Card, Fault, Probe, Vendor
from gpu.facts import Facts, Holder, Service
from gpu.llama import BUILD_COMMAND
from gpu.matching import visible_cuda, visible_hip
from gpu.rpc import WorkerState
from gpu.show import wrapped
from planner.types import HOST_POOL, Device, DeviceKind
from planner.units import GIB, MIB, format_size

LITTLE_MEMORY: Final = 2 * GIB  # less holds no model worth serving beside its caches
ENOUGH_FILES: Final = 4096  # two descriptors for each streaming client
ENOUGH_LOCKED: Final = 64 * MIB  # systemd's and the kernel's default is 8 MiB: a limit that nobody chose
# A llama-server that serves one conversation had 25 threads on two cores: two sets that compute, of one for each core,
# its listeners, and those for requests, of which there are as many as cores at least (server-http.cpp). Each request
# beyond these gets a thread of its own. A card's driver adds a few.
THREADS_OF_RUNNER: Final = 24
THREADS_PER_CORE: Final = 3
THREADS_FOR_CLIENTS: Final = 64  # below that a few tabs of a browser bring a runner down
HELD_BY_OTHERS: Final = 0.1  # of a card: less is a desktop
_CUDA_NODES: Final = frozenset({"nvidia-uvm", "dxg"})  # the second is WSL's
_RUNNERS: Final = re.compile(r"llama-server|ggml-rpc-server|ollama.*")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, and what mends it."""

    about: str
    wrong: bool
    what: str
    fix: str


def examine(facts: Facts) -> tuple[Finding, ...]:
    """Return everything that is wrong or worth knowing, in the order of the checks."""
    return tuple(
        Finding(about, wrong, fault.what, fault.fix) for about, check in CHECKS for wrong, fault in check(facts)
    )


def is_healthy(findings: tuple[Finding, ...]) -> bool:
    """Say whether nothing is wrong."""
    return not any(finding.wrong for finding in findings)


Found = Iterator[tuple[bool, Fault]]
_WRONG: Final = True
_NOTE: Final = False


# ---------------------------------------------------------------------------------------------------------------------
# Drivers


def _nvidia(facts: Facts) -> Found:
    on_bus = [gpu for gpu in facts.pci if gpu.vendor == "NVIDIA"]
    for fault in facts.nvidia.faults:
        yield _WRONG, fault
    if on_bus and not facts.nvidia.faults and not facts.nvidia.cards:
        yield _WRONG, _no_nvidia_driver(facts, on_bus[0].address, on_bus[0].driver)
    elif any(not card.unified for card in facts.nvidia.cards) and not facts.nodes & _CUDA_NODES:
        what = "the card is seen but CUDA cannot use it: /dev/nvidia-uvm is missing"
        yield _WRONG, Fault(what, _container_flags("--gpus all", facts) or "sudo nvidia-modprobe -u -c=0")


def _no_nvidia_driver(facts: Facts, address: str, driver: str | None) -> Fault:
    if facts.in_container:
        what = f"this container was started without the GPU {address} of its machine"
        return Fault(
            what, "docker run --gpus all ... (needs the NVIDIA container toolkit); podman: --device nvidia.com/gpu=all"
        )
    if driver in {"nouveau", "vfio-pci"}:
        fix = "install NVIDIA's own driver and reboot" if driver == "nouveau" else "give it back to the nvidia driver"
        return Fault(f"the card {address} belongs to the driver {driver}, with which nothing can compute", fix)
    if facts.nvidia.installed:
        return Fault(
            f"the driver does not know the card {address}", "see the kernel log (dmesg | grep -i nvrm); reboot"
        )
    return Fault(
        f"there is no NVIDIA driver for the card {address}", "install your distribution's NVIDIA driver and reboot"
    )


def _container_flags(flags: str, facts: Facts) -> str | None:
    return f"start the container with {flags}" if facts.in_container else None


def _amd(facts: Facts) -> Found:
    on_bus = [gpu for gpu in facts.pci if gpu.vendor == "AMD"]
    for fault in facts.amd.faults:
        yield _WRONG, fault
    if on_bus and not facts.amd.cards and not facts.amd.faults:
        address, driver = on_bus[0].address, on_bus[0].driver
        fix = "sudo modprobe amdgpu, or install the kernel's amdgpu firmware package and reboot"
        # A display controller that amdgpu drives without KFD has nothing to compute with.
        yield (
            driver != "amdgpu",
            Fault(
                f"the card {address} is there but the kernel offers no compute on it (driver {driver or 'none'})",
                _container_flags("--device /dev/kfd --device /dev/dri", facts) or fix,
            ),
        )
    for card in facts.amd.cards:
        if card.why_not is not None:
            flags = _container_flags("--device /dev/kfd --device /dev/dri --group-add video --group-add render", facts)
            yield _WRONG, Fault(f"{card.name} ({card.pci_bus_id}): {card.why_not.what}", flags or card.why_not.fix)


def _settings_of_cards(facts: Facts) -> Found:
    for name, card in facts.cards.items():
        if card.vendor is Vendor.NVIDIA and card.why_not is not None:
            yield _WRONG, Fault(f"{name}: {card.why_not.what}", card.why_not.fix)
        if card.free_bytes is None and not card.unified:
            yield _NOTE, Fault(f"{name}: its driver does not tell how much memory is free", "see nvidia-smi or amd-smi")
        if card.drives_display:
            what = f"{name} drives a display, whose programs come and go"
            yield _NOTE, Fault(what, f"leave them room: PLANNER_GPU_OVERHEAD={name}=512MiB")
        lanes, most = card.link.pcie_lanes, card.link.pcie_lanes_max
        if lanes is not None and most is not None and lanes < most:
            what = f"{name} is connected by {lanes} of its {most} PCIe lanes, so models load slower"
            yield _NOTE, Fault(what, "another slot, or a riser or cable that is seated well, has more")


# ---------------------------------------------------------------------------------------------------------------------
# llama-server and what it sees


def _llama_server(facts: Facts) -> Found:
    if facts.build.path is None:
        yield _WRONG, Fault(f"no llama-server found; looked for: {'; '.join(facts.tried)}", BUILD_COMMAND)
        return
    for name, fault in facts.left_idle.items():
        device, card = facts.machine.device(name), facts.cards.get(name)
        wrong = device.pool != HOST_POOL and not (card is not None and card.part_of)
        yield wrong, Fault(f"{name} ({device.description}) is left idle: {fault.what}", fault.fix)
    if facts.workers and "rpc" not in facts.build.backends:
        yield _WRONG, Fault(f"{facts.build.path} was built without RPC, so no worker can be used", BUILD_COMMAND)
    for line in facts.failed:
        fix = f"build one for this machine with: {BUILD_COMMAND}, or take it away"
        yield _NOTE, Fault(f"a llama-server does not run: {line}", fix)


def _variables(facts: Facts) -> Found:
    environ = facts.environ
    yield from _narrowing("CUDA_VISIBLE_DEVICES", visible_cuda, facts.nvidia, facts)
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        yield from _narrowing(name, visible_hip, facts.amd, facts)
    cuda = environ.get("CUDA_VISIBLE_DEVICES")
    left = visible_hip(facts.amd.cards, {"CUDA_VISIBLE_DEVICES": cuda or ""})
    if len(left) < len(facts.amd.cards) and not environ.get("HIP_VISIBLE_DEVICES"):
        what = f"CUDA_VISIBLE_DEVICES={cuda} is read by HIP too and hides AMD's cards"
        yield _WRONG, Fault(what, "set HIP_VISIBLE_DEVICES to AMD's cards as well, or unset it")
    numbered = cuda is not None and re.search(r"(^|,)\s*\d", cuda)
    if numbered and len({card.name for card in facts.nvidia.cards}) > 1:
        if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            what = f"CUDA_VISIBLE_DEVICES={cuda} counts in PCI order here, but fastest card first in other programs"
            yield _WRONG, Fault(what, "export CUDA_DEVICE_ORDER=PCI_BUS_ID, or name cards by UUID (nvidia-smi -L)")
    elif environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") != "PCI_BUS_ID":
        what = f"CUDA_DEVICE_ORDER={environ['CUDA_DEVICE_ORDER']} is not what runners get: they count in PCI order"
        yield _NOTE, Fault(what, "unset it, or export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    if environ.get("NVIDIA_VISIBLE_DEVICES") in {"none", "void"}:
        what = f"NVIDIA_VISIBLE_DEVICES={environ['NVIDIA_VISIBLE_DEVICES']} keeps NVIDIA's cards out of this container"
        yield _WRONG, Fault(what, "start it with --gpus all, or NVIDIA_VISIBLE_DEVICES=all")
    for name, says in _ODD_VARIABLES.items():
        if environ.get(name):
            yield _NOTE, Fault(f"{name}={environ[name]} {says}", f"unset {name} unless you need it")


_ODD_VARIABLES: Final = {
    "GGML_VK_VISIBLE_DEVICES": "makes Vulkan count in its own raw order, CPU renderers included",
    "HSA_OVERRIDE_GFX_VERSION": "makes ROCm run kernels that were built for another card",
    "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "is not handed to runners: it lets them overrun a card into host memory",
    "GGML_CUDA_DEVICES": "divides each card into several devices, which is for trials",
}


def _narrowing(name: str, visible: Callable[..., list[Card]], probe: Probe, facts: Facts) -> Found:
    """Say what a variable that lists cards hides, and whether that was meant."""
    value = facts.environ.get(name)
    if value is None or not probe.cards:
        return
    shown = visible(probe.cards, {name: value})
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    if len(shown) < len(entries):
        bad = entries[len(shown)]
        what = f"{name}={value}: {bad} names no card (or one again), so it and all that follow are hidden"
        yield _WRONG, Fault(what, "name cards by UUID (nvidia-smi -L, rocminfo), or unset it")
    elif len(shown) < len(probe.cards):
        hidden = len(probe.cards) - len(shown)
        yield _NOTE, Fault(f"{name}={value} hides {hidden} of {len(probe.cards)} cards", f"unset {name} to use them")


def _packages(facts: Facts) -> Found:
    if facts.pynvml_shadow is not None:
        what = f"an old pynvml package ({facts.pynvml_shadow}) hides NVIDIA's module of that name"
        yield (
            bool(facts.nvidia.installed),
            Fault(what, "pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py"),
        )
    elif facts.pynvml_shim is not None:
        what = "the deprecated pynvml package is installed beside nvidia-ml-py and warns at every start"
        yield _NOTE, Fault(what, "pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py")


# ---------------------------------------------------------------------------------------------------------------------
# Who else is there


def _held(facts: Facts) -> Found:
    for holder in facts.holders:
        device = facts.machine.device(holder.device)
        size = "memory" if holder.used_bytes is None else format_size(holder.used_bytes)
        what = f"{device.name}: process {holder.pid} ({holder.name or 'not to be seen from here'}) holds {size}"
        if holder.name is not None and _RUNNERS.fullmatch(holder.name):
            yield from _runner(holder, what, facts)
        elif holder.name is None:
            yield _NOTE, Fault(what, "it runs in another container, or hangs in the driver: look from the host itself")
        elif _is_much(holder.used_bytes, device.total_bytes):
            yield _NOTE, Fault(what, "end it to make room; plans are made around it")


def _is_much(used_bytes: int | None, total_bytes: int | None) -> bool:
    return used_bytes is not None and total_bytes is not None and used_bytes > HELD_BY_OTHERS * total_bytes


def _runner(holder: Holder, what: str, facts: Facts) -> Found:
    if holder.parent is None and (holder.unit is None or holder.unit == facts.unit):
        yield _WRONG, Fault(f"{what}, and whoever started it is gone", f"kill {holder.pid}")
    elif holder.parent is None or "planner" not in holder.parent:
        by = holder.unit or holder.parent
        yield _NOTE, Fault(f"{what}, started by {by}", "stop that to make room; plans are made around it")


def _workers(facts: Facts) -> Found:
    serves = len(facts.services) > 1
    for worker in facts.workers:
        if worker.why_not is not None:
            wrong = not (serves and worker.state is WorkerState.BUSY)  # a worker that our own service uses is busy too
            what = f"RPC worker {worker.endpoint} is {worker.state}: {worker.why_not.what}"
            yield wrong, Fault(what, worker.why_not.fix)
    for device in facts.machine.devices:
        if device.kind is DeviceKind.RPC and device.usable and _is_uncapped_cpu(device, facts):
            what = f"RPC worker {device.endpoint} is a CPU and calls all RAM there free, in use or not"
            yield _NOTE, Fault(what, f"cap it: PLANNER_RPC_SERVERS={device.endpoint}=SIZE")


def _is_uncapped_cpu(device: Device, facts: Facts) -> bool:
    worker = next((worker for worker in facts.workers if worker.endpoint == device.endpoint), None)
    claims = {one.total_bytes for one in worker.devices if one.is_cpu} if worker else set()
    return device.total_bytes in claims


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def _memory(facts: Facts) -> Found:
    memories = [("", facts.memory), *((f"{service.who}: ", service.memory) for service in facts.services)]
    for who, memory in memories:
        if memory is None:
            continue
        left = format_size(memory.available_bytes)
        if memory.limited_by is not None:
            what = f"{who}the {memory.limited_by} leaves {left} of host memory"
            fix = "raise MemoryMax= or MemoryHigh= of the unit, or the container's --memory"
            yield memory.available_bytes < LITTLE_MEMORY, Fault(what, fix)
        elif memory.available_bytes < LITTLE_MEMORY:
            yield _WRONG, Fault(f"{who}only {left} of host memory are available", "end what holds it (free -h, top)")


def _limits(facts: Facts) -> Found:
    for service in facts.services:
        serves = service is not facts.services[0]
        fix = "in its unit" if serves else "where the service is started (unit, docker --ulimit, limits.conf)"
        if service.open_files is not None and service.open_files < ENOUGH_FILES:
            what = f"{service.who} may open {service.open_files} files, two for each streaming client"
            yield serves, Fault(what, f"LimitNOFILE=65536 {fix}")
        if _locks_little(service):
            size = format_size(service.memlock_bytes or 0)
            what = f"{service.who} may lock {size} of memory, so --load-mode mlock has no effect"
            yield _NOTE, Fault(what, f"LimitMEMLOCK=infinity {fix}")
        needed = THREADS_OF_RUNNER + THREADS_PER_CORE * facts.n_cores
        if service.threads is not None and service.threads.left < needed + THREADS_FOR_CLIENTS:
            left, by = service.threads.left, service.threads.by
            what = f"the {by} leaves {service.who} {left} more threads; a model takes about {needed}, each client one"
            yield left < needed, Fault(what, f"TasksMax=infinity and LimitNPROC=infinity {fix}; docker --pids-limit -1")


def _locks_little(service: Service) -> bool:
    return service.memlock_bytes is not None and service.memlock_bytes < ENOUGH_LOCKED


CHECKS: Final[tuple[tuple[str, Callable[[Facts], Found]], ...]] = (
    ("NVIDIA driver", _nvidia),
    ("AMD driver", _amd),
    ("cards", _settings_of_cards),
    ("llama-server", _llama_server),
    ("environment", _variables),
    ("Python packages", _packages),
    ("GPU memory", _held),
    ("RPC workers", _workers),
    ("host memory", _memory),
    ("limits", _limits),
)


def as_json(findings: tuple[Finding, ...]) -> dict[str, Any]:
    """Return what ``planner doctor --json`` prints."""
    return {
        "schema": 1,
        "healthy": is_healthy(findings),
        "findings": [
            {"about": one.about, "severity": "wrong" if one.wrong else "note", "what": one.what, "fix": one.fix}
            for one in findings
        ],
        "checked": [about for about, _ in CHECKS],
    }


def as_text(findings: tuple[Finding, ...], columns: int = 80) -> str:
    """Return one line for each check that found nothing, and for each finding what it is and what mends it.

    No line is wider than ``columns`` but one that mends, which is a command to be copied.
    """
    indent = " " * len("WRONG  ")
    lines = []
    for about, _ in CHECKS:
        mine = [finding for finding in findings if finding.about == about]
        lines += [] if mine else [f"ok     {about}"]
        for one in mine:
            first, *more = wrapped(f"{about}: {one.what}", indent, columns)
            severity = "WRONG" if one.wrong else "note"
            lines += [f"{severity:<{len(indent)}}{first.lstrip()}", *more, f"{indent}-> {one.fix}"]
    n_wrong = sum(finding.wrong for finding in findings)
    verdict = "Nothing is wrong." if not n_wrong else f"{n_wrong} thing{'s are' if n_wrong > 1 else ' is'} wrong."
    return "\n".join([*lines, "", verdict])
