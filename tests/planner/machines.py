"""Machines that exist only as values, and placements on them as llama.cpp's own arithmetic makes them."""

from __future__ import annotations

from planner.layers import layer_devices
from planner.model import ModelFacts
from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, Placement, PlanRequest, PoolId

FREE_BYTES = 64 << 30


def machine_of(kind: DeviceKind, count: int) -> Machine:
    """Return a machine with that many equal devices, named as llama.cpp names their kind."""
    prefix = {DeviceKind.CUDA: "CUDA", DeviceKind.ROCM: "ROCm", DeviceKind.VULKAN: "Vulkan", DeviceKind.RPC: "RPC"}[
        kind
    ]
    devices = tuple(
        Device(DeviceName(f"{prefix}{number}"), kind, FREE_BYTES, FREE_BYTES, PoolId(f"card{number}"))
        for number in range(count)
    )
    return Machine(devices, Device(HOST, DeviceKind.HOST, FREE_BYTES, FREE_BYTES, HOST_POOL))


def placement_on(machine: Machine, model: ModelFacts, request: PlanRequest) -> Placement:
    """Return where llama.cpp puts the layers for the request's own -ngl and -ts, or equal shares."""
    names = tuple(str(device.name) for device in machine.devices)
    if request.split_mode == "none":
        names = (names[request.main_gpu or 0],)
    shares = (request.tensor_split or (1.0,) * len(names))[: len(names)]
    n_gpu_layers = request.n_gpu_layers if isinstance(request.n_gpu_layers, int) else -1
    layers, output = layer_devices(model.hparams.n_layer_all, n_gpu_layers, shares if names else ())
    return Placement(names, layers, output, n_gpu_layers, shares)
