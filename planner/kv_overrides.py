"""Overridden metadata: ``--override-kv KEY=TYPE:VALUE`` (common/common.cpp, ``string_parse_kv_override``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from planner.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.gguf import MetadataScalar, MetadataValue

_MAX_TEXT: Final = 127  # llama_model_kv_override holds 128 characters
_BOOLS: Final = {"true": True, "false": False}
# Read by layer, so that a key that is not in the file cannot be set (``get_key_or_arr``).
_BY_LAYER: Final = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.recurrent_layers",
    "attention.sliding_window_pattern",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
)


def parse(words: Sequence[str]) -> dict[str, MetadataScalar]:
    """Return the value for each key, the first of several. Raises InvalidRequest for a word that is no override."""
    values: dict[str, MetadataScalar] = {}
    for word in words:
        key, _, typed = word.partition("=")
        kind, colon, text = typed.partition(":")
        value = _value(kind, text) if colon and max(len(key), len(text)) <= _MAX_TEXT else None
        if value is None:
            raise InvalidRequest(f"--override-kv {word}: expected KEY=TYPE:VALUE, TYPE one of int, float, bool, str")
        values.setdefault(key, value)
    return values


def _value(kind: str, text: str) -> MetadataScalar | None:
    try:
        match kind:
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "bool":
                return _BOOLS.get(text)
    except ValueError:
        return None
    return text if kind == "str" else None


def applied(metadata: Mapping[str, MetadataValue], words: Sequence[str]) -> dict[str, MetadataValue]:
    """Return the metadata as llama.cpp reads it under these overrides: they count where the type is the same.

    An array cannot be overridden (src/llama-model-loader.cpp, ``get_key``, ``validate_override``).
    """
    changed = dict(metadata)
    for key, value in parse(words).items():
        present = metadata.get(key)
        absent = present is None and not key.endswith(_BY_LAYER)
        if absent or type(value) is type(present):
            changed[key] = value
    return changed
