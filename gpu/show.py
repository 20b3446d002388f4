"""``planner devices``: the machine as a text table or as JSON. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gpu.card import Card, Vendor
from planner.types import HOST_POOL, Device, Machine
from planner.units import format_size


def as_json(machine: Machine, cards: Mapping[str, Card] = MappingProxyType({})) -> dict[str, Any]:
    """Return what ``planner devices --json`` prints; the host is the last device. Unknown is None.

    It holds all that a plan needs: ``gpu.machine_file`` reads it back. ``cards`` are the cards behind the devices.
    """
    return {
        "devices": [_device_json(device, cards.get(device.name)) for device in (*machine.devices, machine.host)],
        "warnings": list(machine.warnings),
        "looked_for": list(machine.looked_for),
        "pools": [
            {"id": pool.id, "total_bytes": pool.total_bytes, "free_bytes": pool.free_bytes} for pool in machine.pools
        ],
    }


def _device_json(device: Device, card: Card | None) -> dict[str, Any]:
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
        "card": None if card is None else _card_json(card),
    }


def _card_json(card: Card) -> dict[str, Any]:
    """Return what the driver says of the card, beyond what plans are made from."""
    return {
        "driver": card.driver,
        "reserved_bytes": card.reserved_bytes,
        "gtt_bytes": card.gtt_bytes,
        "part_of": card.part_of,
        "asleep": card.asleep,
        "compute_mode": card.compute_mode,
        "drives_display": card.drives_display,
        "numa_node": card.numa_node,
        "pcie_generation": card.link.pcie_generation,
        "pcie_lanes": card.link.pcie_lanes,
        "pcie_lanes_max": card.link.pcie_lanes_max,
        "nvlink_peers": list(card.link.nvlink_peers),
    }


def as_text(machine: Machine, cards: Mapping[str, Card] = MappingProxyType({}), columns: int = 80) -> str:
    """Return the table that ``planner devices`` prints: a line for each device, below it what is odd about it.

    ``cards`` are the cards behind the devices. No line is wider than ``columns``, where names and figures leave room.
    """
    devices = (*machine.devices, machine.host)
    rows = [("device", "free", "total", "bandwidth"), *map(_row, devices)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    indent = " " * (widths[0] + 2)
    left = [_aligned(row, widths) for row in rows]
    room = columns - len(left[0]) - 2
    about = ["description", *(_about(device, cards.get(device.name), room) for device in devices)]
    lines = [f"{figures}  {text}".rstrip() for figures, text in zip(left, about, strict=True)]
    for number, device in reversed(list(enumerate(devices, start=1))):
        notes = _notes(device, machine)
        lines[number + 1 : number + 1] = [line for note in notes for line in wrapped(note, indent, columns)]
    mentioned = {device.why_not for device in devices if device.why_not}
    warnings = [line for line in machine.warnings if not any(why in line for why in mentioned)]
    rest = [line for warning in warnings for line in wrapped(f"warning: {warning}", "", columns)]
    if not machine.devices:
        rest += ["No GPU found. Looked for:", *(f"  {place}" for place in machine.looked_for)]
    return "\n".join([*lines, "", *rest] if rest else lines)


def _row(device: Device) -> tuple[str, ...]:
    bandwidth = device.bandwidth_bytes_per_s
    return (
        device.name,
        _size(device.free_bytes),
        _size(device.total_bytes),
        "?" if bandwidth is None else f"{bandwidth / 1e9:.0f} GB/s",
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Put the name to the left and figures to the right."""
    figures = (f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([f"{row[0]:<{widths[0]}}", *figures])


def _about(device: Device, card: Card | None, room: int) -> str:
    """Return what it is, what matters most first, as much as there is room for."""
    parts = [device.description or device.endpoint or ""]
    if card is not None:
        link = card.link
        parts += [f"at {card.pci_bus_id}"] if card.pci_bus_id else []
        parts += [f"compute {card.arch}" if card.vendor is Vendor.NVIDIA else card.arch] if card.arch else []
        parts += [f"PCIe {link.pcie_generation} x{link.pcie_lanes}"] if link.pcie_generation and link.pcie_lanes else []
        parts += [f"NVLink to {' and '.join(link.nvlink_peers)}"] if link.nvlink_peers else []
        parts += ["asleep"] if card.asleep else []
        parts += ["drives a display"] if card.drives_display else []
    shown = parts[0] if len(parts[0]) <= room else parts[0][: max(room - 3, 0)] + "..."
    for part in parts[1:]:
        if len(f"{shown}, {part}") <= room:
            shown = f"{shown}, {part}"
    return shown


def _notes(device: Device, machine: Machine) -> list[str]:
    """Return what else there is to say of a device, a line each."""
    notes = [] if device.usable else [f"not used: {device.why_not}"]
    others = [other.name for other in (*machine.devices, machine.host) if other.pool == device.pool != HOST_POOL]
    if len(others) > 1 and others[0] == device.name:
        notes.append(f"{' and '.join(others)} share one memory")
    if device.pool == HOST_POOL and device is not machine.host:
        notes.append("its memory is the host's")
    return notes + [
        f"held by process {process.pid} ({process.name or 'not to be seen from here'}): {_size(process.used_bytes)}"
        for process in device.processes
    ]


def wrapped(text: str, indent: str, columns: int) -> list[str]:
    """Return the text in lines of this width, broken between words."""
    lines, line = [], indent
    for word in text.split():
        if len(line) + len(word) > columns and line.strip():
            lines.append(line.rstrip())
            line = f"{indent}  "
        line += f"{word} "
    return [*lines, line.rstrip()]


def _size(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else format_size(size_bytes)
