"""How the values of flags are read and written, as llama-server does (common/arg.cpp of the pinned build).

Each reader takes the word and returns the value, or raises ValueError with what is allowed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

MAX_DEVICES: Final = 16  # llama_max_devices(); -ts and -fitt take one entry less (common/arg.cpp)
MAX_INT: Final = 2**31 - 1  # llama-server reads its numbers with std::stoi


def number(low: int, high: int = MAX_INT) -> Callable[[str], int]:
    """Accept a whole number within a range."""

    def parse(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low}" + (f" to {high}" if high < MAX_INT else ""))
        return value

    return parse


def number_or(words: Mapping[str, Any], low: int) -> Callable[[str], Any]:
    """Accept one of some words, whose values these are, or a whole number from a lowest one."""
    whole = number(low)

    def parse(word: str) -> Any:
        if word in words:
            return words[word]
        try:
            return whole(word)
        except ValueError as error:
            raise ValueError(f"{error}, or {' or '.join(words)}") from None

    return parse


def choice(*allowed: str, also: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], str]:
    """Accept one of some words, or another spelling of one of them."""

    def parse(word: str) -> str:
        value = also.get(word, word)
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return parse


def items(word: str) -> tuple[str, ...]:
    """Split at commas; double quotes protect a comma (common/arg.cpp, ``parse_csv_row``)."""
    parts = next(csv.reader([word], strict=False), [])
    if not parts or not all(parts):
        raise ValueError("a list with commas and no empty entry")
    return tuple(parts)


def join(parts: Iterable[str]) -> str:
    """Return the items with commas; one that has a comma is quoted."""
    return ",".join(f'"{part}"' if "," in part else part for part in parts)


def device_names(word: str) -> tuple[str, ...]:
    """Accept names with commas; ``none`` is no device."""
    return () if word == "none" else items(word)


def join_devices(names: Sequence[str]) -> str:
    """Return the names with commas."""
    return ",".join(names) or "none"


def proportions(word: str) -> tuple[float, ...]:
    """Accept shares with commas or slashes, as ``--tensor-split`` takes them."""
    try:
        values = tuple(float(part) for part in word.replace("/", ",").split(","))
    except ValueError:
        values = (-1.0,)
    if len(values) >= MAX_DEVICES or not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"up to {MAX_DEVICES - 1} proportions with commas, like 3,1")
    return values


def join_proportions(values: Iterable[float]) -> str:
    """Return the shares with commas, whole ones without a fraction."""
    return ",".join(f"{value:g}" if value != int(value) else str(int(value)) for value in values)


def tensor_overrides(word: str) -> tuple[tuple[str, str], ...]:
    """Accept pairs of a pattern and a buffer type."""
    pairs = tuple((pattern, buffer) for pattern, _, buffer in (part.partition("=") for part in word.split(",")))
    if not all(pattern and buffer for pattern, buffer in pairs):
        raise ValueError("PATTERN=BUFFER, like exps=CPU, more of them with commas")
    return pairs


def join_overrides(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the pairs with commas."""
    return ",".join(f"{pattern}={buffer}" for pattern, buffer in pairs)
