"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.units import format_size, parse_size


@pytest.mark.parametrize(
    "text,size_bytes",
    [
        ("0", 0),
        ("1024", 1024),
        ("24GiB", 24 << 30),
        ("8G", 8 << 30),
        ("8gb", 8 << 30),
        ("11500MiB", 11500 << 20),
        ("1.5 GiB", 3 << 29),
        ("0.3k", 307),
        (" 2T ", 2 << 40),
        ("7b", 7),
    ],
)
def test_reads_sizes_in_binary_multiples(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "1,5G", "12 parsecs", "0x10", "\u0661G", "nan", "1" * 30, "1.5"]
)
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "size_bytes,text",
    [
        (0, "0 B"),
        (96, "96 B"),
        (1536, "1.5 KiB"),
        (512 << 20, "512.0 MiB"),
        (-(3 << 30), "-3.0 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_writes_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1 << 60))
def test_a_number_of_bytes_is_read_as_it_is(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(0, 1 << 50))
def test_what_is_written_reads_back_to_its_rounding(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert abs(parse_size(text) - size_bytes) <= max(1, size_bytes // 20)
