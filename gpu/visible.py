"""Which cards CUDA and HIP show, in their order, under the variables that restrict them.

All of these variables list numbers or UUIDs, and the first entry that names no card, or one that was named before,
hides itself and all that follow (CUDA C++ programming guide, environment variables; ROCm documentation, GPU isolation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu.card import Card


def visible_cuda(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """Return NVIDIA's cards in the order of CUDA's numbers, given cards in PCI order."""
    return _shown(cards, environ.get("CUDA_VISIBLE_DEVICES"))


def visible_hip(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """Return AMD's cards in the order of HIP's numbers, given cards in KFD's order.

    The runtime below HIP filters first, HIP numbers what is left; without a variable of its own it reads CUDA's.
    """
    left = _shown(cards, environ.get("ROCR_VISIBLE_DEVICES"))
    return _shown(left, environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES")))


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
    if entry.isdigit():
        return cards[int(entry)] if int(entry) < len(cards) else None
    matches = [card for card in cards if entry and (card.uuid or "").lower().startswith(entry.lower())]
    return matches[0] if len(matches) == 1 else None
