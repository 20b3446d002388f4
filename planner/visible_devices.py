"""Which devices a runner sees: the variables by which drivers hide and order devices, for a process that uses these.

An idle CUDA context costs hundreds of MiB, so a runner sees only the devices it is to use. Where nothing is set here,
what was set when the machine was looked at holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine

# The order of the PCI bus is NVML's; CUDA's own begins with the fastest card.
PCI_ORDER: Final = MappingProxyType({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
# The kinds of which a runner is shown some devices, by UUID.
NARROWED_KINDS: Final = (DeviceKind.CUDA, DeviceKind.ROCM)

_HIDE_ALL: Final = {DeviceKind.CUDA: "CUDA_VISIBLE_DEVICES", DeviceKind.VULKAN: "GGML_VK_VISIBLE_DEVICES"}


def narrowed(used: Sequence[Device], kind: DeviceKind) -> tuple[Device, ...]:
    """Return the devices of this kind where a runner is shown these alone, in this order; else none.

    That takes a UUID of each.
    """
    devices = tuple(device for device in used if device.kind is kind)
    if kind is DeviceKind.CUDA and _reads_cudas_variable(used):
        return ()
    return devices if all(device.uuid for device in devices) else ()


def variables(used: Sequence[Device], machine: Machine, build: LlamaBuild) -> dict[str, str]:
    """Return what is to be set for a runner that uses these devices of the machine."""
    env: dict[str, str] = {}
    if cuda := narrowed(used, DeviceKind.CUDA):
        env |= PCI_ORDER
        env["CUDA_VISIBLE_DEVICES"] = ",".join(device.uuid or "" for device in cuda)
    if rocm := narrowed(used, DeviceKind.ROCM):
        env["ROCR_VISIBLE_DEVICES"] = ",".join(device.uuid or "" for device in rocm)
        env["HIP_VISIBLE_DEVICES"] = ",".join(str(rank) for rank in range(len(rocm)))  # counted after ROCR's choice
    present = {device.kind for device in machine.devices}
    for kind, variable in _HIDE_ALL.items():
        known = kind in present or kind.value in build.backends
        if kind is DeviceKind.CUDA and _reads_cudas_variable(used):
            continue
        if known and not machine.what_if and all(device.kind is not kind for device in used):
            env[variable] = ""
    return env


def _reads_cudas_variable(used: Sequence[Device]) -> bool:
    """Say whether HIP would take CUDA's variable for its own, having none: it would find none of its cards there."""
    return any(device.kind is DeviceKind.ROCM and not device.uuid for device in used)
