"""``planner devices``: the machine as a text table or as JSON. Decides nothing."""

from __future__ import annotations

from typing import Any

from planner.types import Device, Machine
from planner.units import format_size


def as_json(machine: Machine) -> dict[str, Any]:
    """Return what ``planner devices --json`` prints; the host is the last device. Unknown is None.

    It holds all that a plan needs: ``gpu.machine_file`` reads it back.
    """
    return {
        "devices": [_device_json(device) for device in (*machine.devices, machine.host)],
        "warnings": list(machine.warnings),
        "looked_for": list(machine.looked_for),
        "pools": [
            {"id": pool.id, "total_bytes": pool.total_bytes, "free_bytes": pool.free_bytes} for pool in machine.pools
        ],
    }


def _device_json(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "kind": device.kind.value,
        "description": device.description,
        "uuid": device.uuid,
        "pci_bus_id": device.pci_bus_id,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "bandwidth_bytes_per_s": device.bandwidth_bytes_per_s,
        "pool": device.pool,
        "usable": device.usable,
        "why_not": device.why_not,
        "processes": [
            {"pid": process.pid, "name": process.name, "used_bytes": process.used_bytes} for process in device.processes
        ],
        "compute_capability": device.compute_capability,
        "endpoint": device.endpoint,
        "alignment_bytes": device.alignment_bytes,
        "overhead_bytes": device.overhead_bytes,
    }


def as_text(machine: Machine) -> str:
    """Return the table that ``planner devices`` prints, then what is unusable, held by others, or odd."""
    devices = (*machine.devices, machine.host)
    rows = [("DEVICE", "KIND", "FREE", "TOTAL", "BANDWIDTH", "DESCRIPTION"), *map(_row, devices)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    notes = [f"{device.name} cannot be used: {device.why_not}" for device in devices if not device.usable]
    notes += [
        f"{device.name}: process {process.pid} ({process.name or 'unknown'}) holds {_size(process.used_bytes)}"
        for device in devices
        for process in device.processes
    ]
    notes += [f"warning: {warning}" for warning in machine.warnings]
    if not machine.devices:
        notes.append("No GPU found. Looked for:")
        notes += [f"  {place}" for place in machine.looked_for]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _row(device: Device) -> tuple[str, ...]:
    bandwidth = device.bandwidth_bytes_per_s
    return (
        device.name,
        device.kind.value,
        _size(device.free_bytes),
        _size(device.total_bytes),
        "?" if bandwidth is None else f"{bandwidth / 1e9:.0f} GB/s",
        device.description,
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Put names to the left and figures to the right."""
    left, figures = row[:2], row[2:5]
    return [
        *(f"{text:<{width}}" for text, width in zip(left, widths, strict=False)),
        *(f"{text:>{width}}" for text, width in zip(figures, widths[2:], strict=True)),
        row[5],
    ]


def _size(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else format_size(size_bytes)
