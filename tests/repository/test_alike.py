"""What the parts that may not know each other have in common is the same in each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from config import parse
from config.table import KV_CACHE_TYPES
from gpu.llama import KIND_BY_PREFIX
from planner import units
from planner.ggml import KV_TYPE_NAMES


def _read(text: str, module: object) -> int | None:
    try:
        return module.parse_size(text)  # type: ignore[attr-defined, no-any-return]
    except ValueError:
        return None


@given(st.from_regex(r"[0-9]{1,22}(\.[0-9]{1,4})? ?[kKmMgGtTpi]?(i?[bB])?", fullmatch=True))
def test_a_size_is_as_many_bytes_in_a_setting_as_in_a_flag(text: str) -> None:
    assert _read(text, parse) == _read(text, units)


def test_a_fraction_of_a_size_is_rounded_down() -> None:
    assert _read("1.0009k", parse) == _read("1.0009k", units) == 1024


def test_settings_and_flags_take_the_same_cache_types() -> None:
    assert KV_CACHE_TYPES == KV_TYPE_NAMES


def test_a_device_that_a_setting_can_name_can_be_imagined() -> None:
    assert all(parse.device_name(f"{prefix}0") == f"{prefix}0" for prefix in KIND_BY_PREFIX)
    assert {parse.device_name(f"{prefix.lower()}0") for prefix in parse.DEVICE_PREFIXES} == {
        f"{prefix}0" for prefix in KIND_BY_PREFIX
    }
