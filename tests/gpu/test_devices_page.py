"""The page on devices names what the commands print."""

from __future__ import annotations

from pathlib import Path

from gpu import doctor, show, whatif
from gpu.card import Card, Vendor

PAGE = (Path(__file__).parents[2] / "docs/devices.md").read_text()


def test_every_key_of_the_device_list_is_on_the_page() -> None:
    card = Card(Vendor.NVIDIA, "a card", None)
    document = show.as_json(whatif.machine(["CUDA0=1GiB"], host_memory_bytes=2**30), {"CUDA0": card})
    names = {*document, *document["devices"][0], *document["devices"][0]["card"], *document["pools"][0]}
    assert [name for name in sorted(names) if f"`{name}" not in PAGE and f".{name}`" not in PAGE] == []


def test_every_key_of_the_doctors_answer_is_on_the_page() -> None:
    finding = doctor.Finding("cards", wrong=True, what="this", fix="that")
    document = doctor.as_json((finding,))
    assert [name for name in (*document, *document["findings"][0]) if f'"{name}"' not in PAGE] == []
