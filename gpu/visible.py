"""Which NVIDIA cards CUDA shows, in its order, under the variable that restricts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu.card import Card


def visible_cuda(cards: Sequence[Card], environ: Mapping[str, str]) -> list[Card]:
    """Return the cards in the order of CUDA's numbers, given cards in PCI order.

    ``CUDA_VISIBLE_DEVICES`` lists numbers or beginnings of UUIDs; the first entry that names no card, or one that was
    named before, hides itself and all that follow (CUDA C++ programming guide, environment variables).
    """
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
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
