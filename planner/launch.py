"""A plan as a llama-server command line with its environment, and back.

Every knob is written out, so that neither llama-server's defaults nor its configuration files have a say. A runner sees
only the devices it is to use (``visible_devices``). Its own names for them therefore count from 0 again;
``child_names`` maps the plan's names to those.

The environment is what is added to one that was scrubbed of ``LLAMA_ARG_*``. Port, alias, key and an empty
``XDG_CONFIG_HOME`` are added by whoever starts the child.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from planner import flags, visible_devices
from planner.types.machine import Device, DeviceKind, LlamaBuild, Machine
from planner.types.plan import LaunchSpec
from planner.types.request import PlanRequest
from planner.units import MIB

BINARY: Final = "llama-server"
LOG_VERBOSITY: Final = "4"  # the memory lines are on level 4 (common/log.cpp), and the supervisor reads them
MIN_FIT_CTX: Final = 4096  # llama-server's own -fitc

_FIXED: Final = ("-lv", LOG_VERBOSITY)
_NO_FIT: Final = ("--fit", "off")
_NO_BACKTRACE: Final = {"GGML_NO_BACKTRACE": "1"}  # an abort would hold its memory while a debugger looks at it


def spec(
    model_path: str,
    request: PlanRequest,
    machine: Machine,
    build: LlamaBuild,
    *,
    fit_margins: Sequence[int] | None = None,
) -> LaunchSpec:
    """Return the launch of this effective request, whose ``devices`` are names of the machine.

    With ``fit_margins``, the bytes to leave on each of these devices, llama.cpp's own fit places what the request
    leaves open; without them it is off.
    """
    devices = request.devices or ()
    used = tuple(machine.device(name) for name in dict.fromkeys((*devices, *(request.devices_draft or ()))))
    names = child_names(used, machine)
    buffers = _buffer_names(used, machine, names)
    request = replace(
        request,
        rpc=_endpoints(used) or None,
        devices=tuple(names[name] for name in devices),
        devices_draft=_renamed(request.devices_draft, names),
        override_tensor=_rebuffered(request.override_tensor, buffers),
        override_tensor_draft=_rebuffered(request.override_tensor_draft, buffers),
    )
    fit = _NO_FIT if fit_margins is None else _fit(fit_margins)
    argv = (build.path or BINARY, "-m", model_path, *fit, *flags.write(request), *_FIXED)
    return LaunchSpec(argv, MappingProxyType(_NO_BACKTRACE | visible_devices.variables(used, machine, build)))


def read(argv: Sequence[str]) -> PlanRequest:
    """Return the request that this command line asks for: the inverse of ``spec`` for launches without fit.

    Raises InvalidRequest where the words are not a llama-server command line of ours.
    """
    words = list(argv[1:])
    for fixed in (_FIXED, _NO_FIT):
        at = next((i for i in range(len(words) - 1) if tuple(words[i : i + 2]) == fixed), None)
        if at is not None:
            del words[at : at + 2]
    return flags.parse(words).request


def child_names(used: Iterable[Device], machine: Machine) -> dict[str, str]:
    """Return, for each device of the plan, the name that the runner has for it.

    Where a kind is narrowed by visible-device variables, its names count from 0 in plan order; RPC devices count over
    the endpoints that are used (ggml-rpc.cpp, ``ggml_backend_rpc_add_server``); every other name stays.
    """
    used = tuple(used)
    names: dict[str, str] = {device.name: device.name for device in used}
    for kind in visible_devices.NARROWED_KINDS:
        visible = visible_devices.narrowed(used, kind)
        names |= {device.name: _prefix(device) + str(rank) for rank, device in enumerate(visible)}
    workers = _worker_devices(used, machine)
    names |= {name: f"RPC{rank}" for rank, name in enumerate(workers) if name in names}
    return names


def buffer_names(used: Iterable[str], machine: Machine) -> dict[str, str]:
    """Return, for each device name of the plan, how the runner's log calls the buffers there."""
    devices = tuple(machine.device(name) for name in used)
    return _buffer_names(devices, machine, child_names(devices, machine))


def unaddressed(used: Iterable[Device]) -> tuple[str, ...]:
    """Return the RPC devices whose worker's address is not known, so that no command line can reach them."""
    return tuple(device.name for device in used if device.kind is DeviceKind.RPC and device.endpoint is None)


def _prefix(device: Device) -> str:
    return device.name.rstrip("0123456789")


def _endpoints(used: Sequence[Device]) -> tuple[str, ...]:
    """Return the workers' addresses in order; none at all where one is missing, since positions make the names."""
    if unaddressed(used):
        return ()
    return tuple(dict.fromkeys(device.endpoint for device in used if device.endpoint is not None))


def _worker_devices(used: Sequence[Device], machine: Machine) -> tuple[str, ...]:
    """Return the names of all devices of the workers that are used, as the runner counts them: worker by worker."""
    return tuple(
        device.name for endpoint in _endpoints(used) for device in machine.devices if device.endpoint == endpoint
    )


def _fit(margins: Sequence[int]) -> tuple[str, ...]:
    mib = ",".join(str(-(-max(0, margin) // MIB)) for margin in margins)
    return ("--fit", "on", *(("-fitt", mib) if mib else ()), "-fitc", str(MIN_FIT_CTX))


def _renamed(devices: tuple[str, ...] | None, names: Mapping[str, str]) -> tuple[str, ...] | None:
    return None if devices is None else tuple(names.get(name, name) for name in devices)


def _buffer_names(used: Sequence[Device], machine: Machine, names: Mapping[str, str]) -> dict[str, str]:
    """Return the runner's name of each device's buffer type.

    A worker's carries its address and the index there, not the index over all workers (ggml-rpc.cpp).
    """
    buffers = dict(names)
    for endpoint in _endpoints(used):
        at = [device.name for device in machine.devices if device.endpoint == endpoint]
        buffers |= {name: f"RPC{index}[{endpoint}]" for index, name in enumerate(at)}
    return buffers


def _rebuffered(
    overrides: tuple[tuple[str, str], ...] | None, buffers: Mapping[str, str]
) -> tuple[tuple[str, str], ...] | None:
    return None if overrides is None else tuple((pattern, buffers.get(name, name)) for pattern, name in overrides)
