"""The keys of the models file: one table for each section. The parser, the documentation and the schema render it.

A key means the same as the setting or the llama-server flag of its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from config.model_settings import ExternalRunner, ModelSettings, Table
from config.parse import Kind, boolean, choice, device_name, duration, parse_size, path, size_in_mib, whole_number
from config.table import KV_CACHE_TYPES, MAX_CACHE_RAM_MIB, MAX_CONTEXT, MAX_SLOTS

MAX_PRIORITY: Final = 1000
HOST: Final = "Host"


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section. ``parse`` raises ValueError or TypeError for what is not ``allowed``."""

    name: str
    allowed: str
    parse: Callable[[Any], Any]
    meaning: str
    schema: Table
    required: bool = False


def _scalar(name: str, kind: Kind[Any], meaning: str, *types: type, required: bool = False) -> Key:
    """Return a key that is read as the setting of the same kind is; TOML's numbers and truths count as their text."""
    accepted = types or (str,)

    def parse(value: Any) -> Any:
        if type(value) not in accepted:
            raise TypeError(value)
        return kind.parse(str(value).lower() if isinstance(value, bool) else str(value))

    return Key(name, kind.allowed, parse, meaning, {"type": [_JSON_TYPES[one] for one in accepted]}, required)


def _words(name: str, meaning: str, item: Callable[[str], str] = str, *, required: bool = False) -> Key:
    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise TypeError(value)
        return tuple(map(item, value))

    schema = {"type": "array", "items": {"type": "string"}}
    return Key(name, "a list of texts", parse, meaning, schema, required)


def _table(name: str, meaning: str, parse_value: Callable[[str, Any], tuple[str, Any]], allowed: str) -> Key:
    def parse(value: Any) -> Table:
        if not isinstance(value, dict):
            raise TypeError(value)
        return MappingProxyType(dict(parse_value(key, each) for key, each in value.items()))

    return Key(name, allowed, parse, meaning, {"type": "object"})


def _json_value(key: str, value: Any) -> tuple[str, Any]:
    json.dumps(value, allow_nan=False)  # TOML's times and infinities have no place in a request
    return key, value


def _device_size(key: str, value: Any) -> tuple[str, int]:
    name = HOST if key.lower() == HOST.lower() else device_name(key)
    if type(value) not in {int, str}:
        raise TypeError(value)
    return name, parse_size(str(value))


def _text_value(key: str, value: Any) -> tuple[str, str]:
    if not isinstance(value, str):
        raise TypeError(value)
    return key, value


def _projector(value: Any) -> str | bool:
    if value is False or (isinstance(value, str) and value):
        return value
    raise TypeError(value)


_JSON_TYPES: Final = {str: "string", int: "integer", float: "number", bool: "boolean"}
_TEXT: Final[Kind[str]] = Kind("a text", str, str)
_ROLES: Final = choice("chat", "embedding", "rerank")

# What the scheduler asks of any runner.
_SCHEDULING: Final = (
    _scalar(
        "keep_alive",
        duration(forever="never unload"),
        "How long it stays loaded when idle; as PLANNER_KEEP_ALIVE.",
        str,
        int,
        float,
    ),
    _scalar("pin", boolean(), "Never evict it to make room for another.", bool),
    _scalar(
        "priority", whole_number(0, MAX_PRIORITY), "Of two that could be evicted, the lower goes; 0 if unset.", int
    ),
    _scalar("preload", boolean(), "Load it when the service starts.", bool),
    _words("aliases", "Other names that clients may use."),
    _scalar("role", _ROLES, "What it is served for; where the header does not tell."),
)

MODEL_KEYS: Final = (
    _scalar("context", whole_number(1, MAX_CONTEXT), "Tokens for each conversation; as PLANNER_CONTEXT_LENGTH.", int),
    _scalar("slots", whole_number(1, MAX_SLOTS), "Conversations at a time; as PLANNER_NUM_PARALLEL.", int),
    _scalar("kv_cache_type", choice(*KV_CACHE_TYPES), "Type of the K and V caches; as PLANNER_KV_CACHE_TYPE."),
    _scalar("flash_attention", choice("auto", "on", "off"), "As PLANNER_FLASH_ATTENTION."),
    _scalar("cache_ram", size_in_mib(MAX_CACHE_RAM_MIB), "Host memory for idle prompts; as PLANNER_CACHE_RAM."),
    _words("devices", "The devices that it may use, in this order.", device_name),
    _scalar("draft", _TEXT, "The draft model for speculative decoding: a model's id, or a path."),
    Key(
        "projector",
        "a path, or false for none",
        _projector,
        "Its multimodal projector, where the file beside it is not the one.",
        {"type": ["string", "boolean"]},
    ),
    _scalar("mtp", boolean(), "Speculate with the model's own prediction layers, where it has them.", bool),
    _words("flags", "More flags of llama-server, each word a text. Those that the service owns are refused."),
    *_SCHEDULING,
    _table("set", "Fields put into a request that lacks them.", _json_value, "a table of request fields"),
    _table("force", "Fields put into every request.", _json_value, "a table of request fields"),
    _words("strip", "Fields taken out of every request."),
)

DEFAULT_KEYS: Final = tuple(key for key in MODEL_KEYS if key.name not in {"aliases", "draft", "projector"})

EXTERNAL_KEYS: Final = (
    _words("cmd", "The program and its arguments; {port} stands for a free port.", required=True),
    _scalar("url", _TEXT, "Where it answers, such as http://127.0.0.1:{port}.", required=True),
    _scalar("health", _TEXT, "The path that answers 200 once it is ready, such as /health.", required=True),
    _table("bytes", 'What it takes on each device: CUDA0 = "6GiB", Host = "2GiB".', _device_size, "a table of sizes"),
    _table("env", "Variables for its environment.", _text_value, "a table of texts"),
    _scalar("folder", path(), "Its working folder."),
    _scalar("slots", whole_number(1, MAX_SLOTS), "Requests that it serves at a time.", int),
    *_SCHEDULING,
)

SECTIONS: Final[Mapping[str, tuple[tuple[Key, ...], type[Any], str]]] = MappingProxyType(
    {
        "models": (MODEL_KEYS, ModelSettings, 'One table for each model: [models."qwen3-8b"].'),
        "external": (
            EXTERNAL_KEYS,
            ExternalRunner,
            "One table for each program that is no llama-server: [external.comfy].",
        ),
    }
)
# The dataclasses' names where they say more than the file's.
FIELDS: Final = MappingProxyType({"bytes": "bytes_by_device"})
