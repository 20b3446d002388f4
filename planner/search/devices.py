"""The devices that a request names, and those that it leaves to be used."""

from __future__ import annotations

from planner import weights
from planner.errors import InvalidRequest
from planner.types.machine import Device, Machine
from planner.types.request import PlanRequest


def chosen_devices(request: PlanRequest, machine: Machine) -> tuple[Device, ...]:
    """Return the devices that may be used, in llama-server's order. Raises InvalidRequest for a name that is none."""
    if request.devices is None:
        chosen = tuple(device for device in machine.devices if device.usable)
    else:
        chosen = tuple(device_named("--device", name, machine) for name in request.devices)
    # No other mode looks at it (src/llama.cpp, llama_prepare_model_devices).
    if request.split_mode == "none" and chosen and (request.main_gpu or 0) >= len(chosen):
        raise InvalidRequest(f"--main-gpu {request.main_gpu}: there are {len(chosen)} devices, counted from 0")
    return chosen


def device_named(flag: str, name: str, machine: Machine) -> Device:
    """Return the device that this flag names, in any case, as in llama-server. Raises InvalidRequest."""
    device = next((device for device in machine.devices if device.name.lower() == name.lower()), None)
    if device is None:
        names = ", ".join(device.name for device in machine.devices) or "none at all"
        raise InvalidRequest(f"{flag} {name}: no such device; there is {names}")
    if not device.usable:
        raise InvalidRequest(f"{flag} {name}: it cannot be used: {device.why_not}")
    return device


def buffer_refusal(request: PlanRequest, machine: Machine) -> str | None:
    """Return why llama-server would not take an override's buffer type, or None; it looks at those first of all."""
    unknown = weights.unknown_buffer(
        (*(request.override_tensor or ()), *(request.override_tensor_draft or ())), machine.devices
    )
    if unknown is None:
        return None
    known = ", ".join(["CPU", *(device.name for device in machine.devices)])
    return f"--override-tensor: there is no buffer type {unknown}, but {known}"
