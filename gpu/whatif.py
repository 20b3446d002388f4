"""A machine that the user names: devices with their free memory, cards from a catalogue, or none at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gpu import host
from gpu.llama import KIND_BY_PREFIX, kind_of
from planner.types import HOST_POOL, Device, DeviceName, Machine, MemoryPool, PoolId
from planner.units import GIB, MIB, format_size, parse_size

_CATALOGUE: Final = Path(__file__).with_name("catalogue.json")
# What the driver keeps of the memory that its tool shows: 0.7 to 2.2 % on the cards it was reported for.
_USABLE_OF_SHOWN: Final = 0.985
MAX_DEVICES: Final = 16  # GGML_CUDA_MAX_DEVICES, and llama.cpp's own limit for one model
_DEVICE: Final = re.compile(r"([A-Za-z]+)(\d{1,3})(?:@([A-Za-z0-9._-]+:\d{1,5}))?")
_PREFIXES: Final = {prefix.lower(): prefix for prefix in KIND_BY_PREFIX}
_CUSTOM: Final = "custom:"
_VENDORS: Final = {"nv": "CUDA", "amd": "ROCm", "intel": "Vulkan"}


class WhatIfError(ValueError):
    """A device, card or size that cannot be understood; the text is the one line for the user."""


@dataclass(frozen=True, slots=True)
class CatalogueCard:
    """A card by its key. ``shown_bytes`` is what the vendor's tool shows; ``unified``: it is the host's memory."""

    key: str
    name: str
    prefix: str
    shown_bytes: int
    bandwidth_bytes_per_s: int
    arch: str
    unified: bool


def machine(
    device_specs: Sequence[str] = (),
    gpu_specs: Sequence[str] = (),
    *,
    host_memory_bytes: int | None = None,
    more_cards: Path | None = None,
    root: Path = Path("/"),
) -> Machine:
    """Return the machine of ``NAME=SIZE`` and ``CARD[:COUNT]`` specs, in their order; neither: no GPU at all.

    SIZE is free memory; ``RPC0@host:port=SIZE`` names a worker; a card may be ``custom:mem=SIZE,bw=GB_PER_S``.
    ``more_cards`` is the user's own catalogue. Without ``host_memory_bytes`` the host is this machine's. Raises
    WhatIfError with the nearest names where a name is unknown.
    """
    cards = [card for spec in _joined(gpu_specs) for card in _cards(spec, more_cards)]
    memory = _host_memory(host_memory_bytes, cards, root)
    devices = [_named(spec) for spec in device_specs]
    for card in cards:
        devices.append(_card_device(card, _next_name(card.prefix, devices), memory))
    names = [device.name for device in devices]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise WhatIfError(f"{twice} is named twice")
    if len(devices) > MAX_DEVICES:
        raise WhatIfError(f"{len(devices)} devices are more than llama.cpp's limit of {MAX_DEVICES}")
    pools = {HOST_POOL: memory.pool()}
    for device in devices:
        pools.setdefault(device.pool, MemoryPool(device.pool, device.total_bytes, device.free_bytes))
    return Machine(tuple(devices), memory.device(), pools=tuple(pools.values()), what_if=True)


def with_host_memory(machine: Machine, available_bytes: int) -> Machine:
    """Return the machine with a host of this memory, in every device and pool that has a part in it."""
    memory = host.HostMemory(available_bytes, available_bytes)
    return replace(
        machine,
        host=memory.device(),
        devices=tuple(
            replace(
                device,
                total_bytes=available_bytes if device.total_bytes is None else min(device.total_bytes, available_bytes),
                free_bytes=available_bytes if device.free_bytes is None else min(device.free_bytes, available_bytes),
            )
            if device.pool == HOST_POOL
            else device
            for device in machine.devices
        ),
        pools=(memory.pool(), *(pool for pool in machine.pools if pool.id != HOST_POOL)),
    )


def _named(spec: str) -> Device:
    name, given, size_text = spec.rpartition("=")
    match = _DEVICE.fullmatch(name.strip())
    if not given or match is None:
        raise WhatIfError(f"--device {spec!r}: write NAME=SIZE, such as CUDA0=24GiB or RPC0@10.0.0.2:50052=24GiB")
    prefix = _PREFIXES.get(match.group(1).lower())
    if prefix is None:
        known = ", ".join(f"{prefix}0" for prefix in _PREFIXES.values())
        raise WhatIfError(f"--device {spec!r}: {name} is no name that llama.cpp gives a device; known are {known}")
    endpoint = match.group(3)
    if endpoint is not None and prefix != "RPC":
        raise WhatIfError(f"--device {spec!r}: only an RPC device has an address")
    try:
        free = parse_size(size_text)
    except ValueError as error:
        raise WhatIfError(f"--device {spec!r}: {error}") from None
    kind = kind_of(prefix)
    return Device(
        name=DeviceName(prefix + match.group(2)),
        kind=kind,
        total_bytes=free,
        free_bytes=free,
        pool=PoolId(prefix + match.group(2)),
        description="what-if",
        endpoint=endpoint,
    )


def _host_memory(given_bytes: int | None, cards: Sequence[CatalogueCard], root: Path) -> host.HostMemory:
    """Return the host that was asked for, else that of a card that is one with its host, else this machine's."""
    if given_bytes is None:
        given_bytes = max((card.shown_bytes for card in cards if card.unified), default=None)
    return host.read(root) if given_bytes is None else host.HostMemory(given_bytes, given_bytes)


def _next_name(prefix: str, devices: Sequence[Device]) -> str:
    taken = {device.name for device in devices}
    return next(f"{prefix}{number}" for number in range(len(taken) + 1) if f"{prefix}{number}" not in taken)


def _joined(specs: Sequence[str]) -> list[str]:
    """Return the specs with what a comma parted put together again: ``custom:mem=24GiB`` and ``bw=900`` are one."""
    joined: list[str] = []
    for spec in specs:
        if joined and joined[-1].startswith(_CUSTOM) and re.match(r"[a-z]+=", spec):
            joined[-1] += f",{spec}"
        else:
            joined.append(spec)
    return joined


def _cards(spec: str, more_cards: Path | None) -> list[CatalogueCard]:
    if spec.startswith(_CUSTOM):
        return [_custom(spec)]
    key, _, count_text = spec.partition(":")
    if count_text and not (re.fullmatch(r"[0-9]{1,3}", count_text) and 0 < int(count_text) <= MAX_DEVICES):
        raise WhatIfError(f"--gpu {spec!r}: {count_text!r} is not a count from 1 to {MAX_DEVICES}")
    return [_find(key, more_cards)] * int(count_text or 1)


def _custom(spec: str) -> CatalogueCard:
    """Return the card of ``custom:mem=24GiB,bw=900,kind=rocm``: ``bw`` in GB/s and ``kind`` (cuda) may be left out."""
    given = dict(part.partition("=")[::2] for part in spec.removeprefix(_CUSTOM).split(","))
    allowed = "write custom:mem=SIZE, and bw=GB_PER_S and kind=cuda|rocm|vulkan if you like"
    if unknown := given.keys() - {"mem", "bw", "kind"}:
        raise WhatIfError(f"--gpu {spec!r}: {min(unknown)!r} is unknown; {allowed}")
    kind = _PREFIXES.get(given.get("kind", "cuda"))
    bandwidth = re.fullmatch(r"[0-9]{1,6}", given.get("bw", "0"))
    if "mem" not in given or kind not in {"CUDA", "ROCm", "Vulkan"} or bandwidth is None:
        raise WhatIfError(f"--gpu {spec!r}: {allowed}")
    try:
        size = parse_size(given["mem"])
    except ValueError as error:
        raise WhatIfError(f"--gpu {spec!r}: {error}") from None
    return CatalogueCard(
        "custom", f"card of {format_size(size)}", kind, size, int(bandwidth.group()) * 10**9, "", False
    )


def _card_device(card: CatalogueCard, name: str, memory: host.HostMemory) -> Device:
    kind = kind_of(card.prefix)
    usable = memory.total_bytes if card.unified else round(card.shown_bytes * _USABLE_OF_SHOWN)
    return Device(
        name=DeviceName(name),
        kind=kind,
        total_bytes=usable,
        free_bytes=memory.available_bytes if card.unified else usable,
        pool=HOST_POOL if card.unified else PoolId(name),
        description=f"{card.name} (what-if)",
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s or None,
        compute_capability=card.arch or None,
    )


def catalogue(more_cards: Path | None = None) -> dict[str, CatalogueCard]:
    """Return every card of the catalogue by its key; of two with one key the user's own holds.

    ``more_cards`` is a file of the same form as ``catalogue.json``; that it is not there is no error. Raises
    WhatIfError where it is not of that form.
    """
    cards = {row["key"]: _row(row) for row in json.loads(_CATALOGUE.read_text(encoding="utf-8"))["cards"]}
    if more_cards is None or not more_cards.exists():
        return cards
    try:
        rows = json.loads(more_cards.read_text(encoding="utf-8"))["cards"]
        return cards | {row["key"]: _row(row) for row in rows}
    except OSError as error:
        raise WhatIfError(f"{more_cards}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        needs = "cards, each with key, name, vendor (nv, amd, intel), nominal_gib and bandwidth_gbs"
        raise WhatIfError(
            f"{more_cards}: no card catalogue ({error!r}): a JSON object with a list of {needs}"
        ) from None


def _row(row: Mapping[str, Any]) -> CatalogueCard:
    shown_mib = row.get("smi_total_mib")
    return CatalogueCard(
        key=row["key"],
        name=row["name"],
        prefix=_VENDORS[row["vendor"]],
        shown_bytes=int(row["nominal_gib"] * GIB if shown_mib is None else shown_mib * MIB),
        bandwidth_bytes_per_s=int(row["bandwidth_gbs"] * 10**9),
        arch=str(row.get("arch", "")),
        unified=bool(row.get("unified", False)),
    )


def _find(text: str, more_cards: Path | None) -> CatalogueCard:
    """Return the card that a user's spelling means: ``4090``, ``RTX 4090`` and ``rtx-4090`` are ``rtx4090``."""
    cards = catalogue(more_cards)
    wanted = _plain(text)
    by_plain = {_plain(key): card for key, card in cards.items()}
    for candidate in (wanted, f"rtx{wanted}", f"gtx{wanted}", f"rx{wanted}"):
        if candidate in by_plain:
            return by_plain[candidate]
    from difflib import get_close_matches  # noqa: PLC0415 - only a slip of the keyboard pays for it

    nearest = get_close_matches(wanted, by_plain, n=3, cutoff=0.5)
    hint = (
        "nearest: " + ", ".join(by_plain[match].key for match in nearest) if nearest else f"it has {', '.join(cards)}"
    )
    raise WhatIfError(f"--gpu {text!r} is not in the card catalogue; {hint} (or say custom:mem=SIZE)")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("nvidia ").removeprefix("geforce "))
