"""Reads what ``planner devices --json`` wrote, so that another machine can be planned for: ``--machine FILE``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final, TypeVar

from gpu.whatif import MAX_DEVICES, WhatIfError
from planner.types import HOST, HOST_POOL, Device, DeviceKind, DeviceName, Machine, MemoryPool, PoolId

MAX_FILE_BYTES: Final = 1 << 20  # sixteen devices take some KiB
_NAME: Final = re.compile(r"[A-Za-z]+[0-9]*|RPC\[[^\s\[\],]+\]")  # CUDA0, BLAS, and a worker that did not answer
_MEANT: Final[dict[type, str]] = {int: "number", str: "text", bool: "true or false"}
_REQUIRED: Final[Any] = object()

T = TypeVar("T")


def read(path: str) -> Machine:
    """Return the machine that the file describes, as one that need not be here. Raises WhatIfError with one line."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        document = json.loads(data) if len(data) <= MAX_FILE_BYTES else None
    except OSError as error:
        raise WhatIfError(f"--machine {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("devices"), list):
        raise WhatIfError(f"--machine {path}: not a machine; write one there with: planner devices --json > {path}")
    try:
        return _machine(document)
    except _BadFieldError as error:
        raise WhatIfError(f"--machine {path}: {error}") from None


class _BadFieldError(Exception):
    """A field that does not hold what belongs there; the text says which."""


def _machine(document: dict[str, Any]) -> Machine:
    everything = [_device(row, f"devices[{index}]") for index, row in enumerate(document["devices"])]
    hosts = [device for device in everything if device.kind is DeviceKind.HOST]
    devices = tuple(device for device in everything if device.kind is not DeviceKind.HOST)
    if len(hosts) != 1:
        raise _BadFieldError(f"{len(hosts)} devices of the kind host, where one belongs")
    if sum(device.usable for device in devices) > MAX_DEVICES:
        raise _BadFieldError(f"more than llama.cpp's limit of {MAX_DEVICES} devices")
    names = [device.name for device in everything]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _BadFieldError(f"{twice} is there twice")
    return Machine(devices, hosts[0], pools=_pools(document, everything), what_if=True)


def _device(row: Any, where: str) -> Device:
    if not isinstance(row, dict):
        raise _BadFieldError(f"{where}: not an object")
    kind = _field(row, "kind", where, str)
    if kind not in set(DeviceKind):
        raise _BadFieldError(f"{where}: kind {kind!r} is none of {', '.join(DeviceKind)}")
    name = _field(row, "name", where, str)
    if not (name == HOST if kind == DeviceKind.HOST else _NAME.fullmatch(name)):
        raise _BadFieldError(f"{where}: {name!r} is no name that llama-server gives a device of the kind {kind}")
    total, free = _bytes(row, "total_bytes", where), _bytes(row, "free_bytes", where)
    if total is not None and free is not None and free > total:
        raise _BadFieldError(f"{where}: free_bytes is more than total_bytes")
    return Device(
        name=DeviceName(name),
        kind=DeviceKind(kind),
        total_bytes=total,
        free_bytes=free,
        pool=PoolId(_field(row, "pool", where, str, HOST_POOL if kind == DeviceKind.HOST else name)),
        description=_field(row, "description", where, str, ""),
        uuid=_field(row, "uuid", where, str, None),
        pci_bus_id=_field(row, "pci_bus_id", where, str, None),
        bandwidth_bytes_per_s=_bytes(row, "bandwidth_bytes_per_s", where, optional=True),
        compute_capability=_field(row, "compute_capability", where, str, None),
        endpoint=_field(row, "endpoint", where, str, None),
        alignment_bytes=_bytes(row, "alignment_bytes", where, optional=True),
        overhead_bytes=_bytes(row, "overhead_bytes", where, optional=True),
        usable=_field(row, "usable", where, bool, default=True),
        why_not=_field(row, "why_not", where, str, None),
    )


def _pools(document: dict[str, Any], devices: list[Device]) -> tuple[MemoryPool, ...]:
    """Return the pools that the file names, and for every other device one of its own figures."""
    pools = {}
    rows = document.get("pools", [])
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        where = f"pools[{index}]"
        if not isinstance(row, dict):
            raise _BadFieldError(f"{where}: not an object")
        pool = PoolId(_field(row, "id", where, str))
        pools[pool] = MemoryPool(pool, _bytes(row, "total_bytes", where), _bytes(row, "free_bytes", where))
    for device in devices:
        pools.setdefault(device.pool, MemoryPool(device.pool, device.total_bytes, device.free_bytes))
    return tuple(pools.values())


def _field(row: dict[str, Any], name: str, where: str, kind: type[T], default: Any = _REQUIRED) -> Any:
    value = row.get(name, default)
    if value is _REQUIRED:
        raise _BadFieldError(f"{where}: {name} is missing")
    if value is not default and not isinstance(value, kind):
        raise _BadFieldError(f"{where}: {name} is {value!r}, where a {_MEANT[kind]} belongs")
    return value


def _bytes(row: dict[str, Any], name: str, where: str, *, optional: bool = False) -> int | None:
    """Return a number of bytes; null is unknown. ``optional``: it may be left out, too."""
    value = row.get(name) if optional or row.get(name, 0) is None else _field(row, name, where, int)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise _BadFieldError(f"{where}: {name} is {value!r}, where a number of bytes or null belongs")
    return value
