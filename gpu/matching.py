"""Which card is which of llama-server's devices.

``--list-devices`` prints neither PCI ids nor UUIDs. But with ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` CUDA's order is that of
the PCI addresses, and HIP's is KFD's, each under the variables that restrict what is visible. These list numbers or
UUIDs, and the first entry that names no card, or one that was named before, hides itself and all that follow (CUDA C++
programming guide, environment variables; ROCm documentation, GPU isolation).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from gpu.card import Card, Vendor
from gpu.llama import ListedDevice
from planner.types import DeviceKind

_SAME_SIZE: Final = 0.05  # CUDA keeps one or two percent of a card, of which Vulkan knows nothing

Pairs = tuple[tuple[ListedDevice, Card | None], ...]


def match(listed: Sequence[ListedDevice], cards: Sequence[Card], environ: Mapping[str, str]) -> Pairs:
    """Pair each device that llama-server lists with the card it is, None where no library of ours knows it.

    A name that contradicts the order wins. A card that CUDA or ROCm lists is not listed again as Vulkan's or SYCL's,
    and neither is one that no library of ours knows: there its name and size tell.
    """
    visible = {
        DeviceKind.CUDA: visible_cuda([card for card in cards if card.vendor is Vendor.NVIDIA], environ),
        DeviceKind.ROCM: visible_hip([card for card in cards if card.vendor is Vendor.AMD], environ),
    }
    pairs: list[tuple[ListedDevice, Card | None]] = []
    taken: list[Card] = []
    dealt = _dealt_round(visible[DeviceKind.CUDA], environ)
    unknown: list[ListedDevice] = []
    for device in listed:
        if dealt and device.kind is DeviceKind.CUDA and (number := device.name.removeprefix("CUDA")).isdecimal():
            card = dealt[int(number) % len(dealt)]
            pairs.append((device, card))
            taken.append(card)
            continue
        same = [card for card in visible.get(device.kind, cards) if _may_be(device, card)]
        left = [card for card in same if card not in taken]
        if same and not left and device.kind not in visible:
            continue
        if not left:
            if (twin := next((other for other in unknown if _is_one(other, device)), None)) is not None:
                unknown.remove(twin)
                continue
            unknown.append(device)
        pairs.append((device, left[0] if left else None))
        taken += left[:1]
    return tuple(pairs)


def _is_one(first: ListedDevice, second: ListedDevice) -> bool:
    """Say whether two backends mean one card."""
    ours, theirs = first.description.lower(), second.description.lower()
    if first.total_bytes is None or second.total_bytes is None:
        return False
    alike = abs(first.total_bytes - second.total_bytes) <= _SAME_SIZE * first.total_bytes
    return first.kind is not second.kind and alike and (ours in theirs or theirs in ours)


def _dealt_round(cards: Sequence[Card], environ: Mapping[str, str]) -> Sequence[Card]:
    """Return the cards that ggml divides into more devices, none where it makes one of each.

    With ``GGML_CUDA_DEVICES`` device i lies on card i modulo their number (ggml-cuda.cu, ggml_cuda_init).
    """
    wanted = environ.get("GGML_CUDA_DEVICES", "")
    return cards if wanted.isdigit() and int(wanted) not in {0, len(cards)} else ()


def unmatched(pairs: Pairs, cards: Sequence[Card]) -> tuple[Card, ...]:
    """Return the cards that are none of the paired devices."""
    taken = [card for _, card in pairs]
    return tuple(card for card in cards if card not in taken)


def _may_be(device: ListedDevice, card: Card) -> bool:
    """Say whether the two names can mean one card. Vulkan adds the driver's name; sysfs knows AMD's by its ISA only."""
    ours, theirs = card.name.lower(), device.description.lower()
    if card.vendor is Vendor.AMD and (card.arch or "gpu") in ours:
        return device.kind is DeviceKind.ROCM or "amd" in theirs or "radeon" in theirs
    return ours in theirs or theirs in ours


def visible_cuda(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """Return NVIDIA's cards in the order of CUDA's numbers, given cards in PCI order."""
    return _shown(cards, environ.get("CUDA_VISIBLE_DEVICES"))


def visible_hip(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """Return AMD's cards in the order of HIP's numbers, given cards in KFD's order.

    The runtime below HIP filters first, HIP numbers what is left; without a variable of its own it reads CUDA's. To
    HIP an empty variable is none, to the runtime below an empty list (ROCclr rocdevice.cpp, Device::init).
    """
    left = _shown(cards, environ.get("ROCR_VISIBLE_DEVICES"))
    return _shown(left, environ.get("HIP_VISIBLE_DEVICES") or environ.get("CUDA_VISIBLE_DEVICES") or None)


def _shown(cards: Sequence[Card], wanted: str | None) -> list[Card]:
    if wanted is None:
        return list(cards)
    shown: list[Card] = []
    for entry in wanted.split(","):
        named = _named(cards, entry.strip())
        if named is None or named in shown:
            break
        shown.append(named)
    return shown


def _named(cards: Sequence[Card], entry: str) -> Card | None:
    if re.fullmatch(r"[0-9]{1,4}", entry):
        return cards[int(entry)] if int(entry) < len(cards) else None
    matches = [card for card in cards if entry and (card.uuid or "").lower().startswith(entry.lower())]
    if not matches:  # of a divided card CUDA shows the first part
        matches = [card for card in cards if entry and (card.part_of or "").lower() == entry.lower()][:1]
    return matches[0] if len(matches) == 1 else None
