"""The keys of the models file: one table for each section. The parser, the documentation and the schema render it.

A key means the same as the setting or the llama-server flag of its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from config.model_settings import ExternalRunner, ModelSettings
from config.parse import Kind, boolean, choice, device_name, duration, parse_size, path, size_in_mib, whole_number
from config.sections import Key, scalar, table, text_value, words
from config.table import KV_CACHE_TYPES, MAX_CACHE_RAM_MIB, MAX_CONTEXT, MAX_SLOTS, SLOTS

MAX_PRIORITY: Final = 1000
HOST: Final = "Host"


def _json_value(key: str, value: Any) -> tuple[str, Any]:
    json.dumps(value, allow_nan=False)  # TOML's times and infinities have no place in a request
    return key, value


def _device_size(key: str, value: Any) -> tuple[str, int]:
    name = HOST if key.lower() == HOST.lower() else device_name(key)
    if type(value) not in {int, str}:
        raise TypeError(value)
    return name, parse_size(str(value))


def _projector(value: Any) -> str | bool:
    if value is False or (isinstance(value, str) and value):
        return value
    raise TypeError(value)


_TEXT: Final[Kind[str]] = Kind("a text", str, str)
_ROLES: Final = choice("chat", "embedding", "rerank")

# What the scheduler asks of any runner.
_SCHEDULING: Final = (
    scalar(
        "keep_alive",
        duration(forever="never unload"),
        "How long it stays loaded when idle; as PLANNER_KEEP_ALIVE.",
        str,
        int,
        float,
    ),
    scalar("pin", boolean(), "Never evict it to make room for another.", bool),
    scalar("priority", whole_number(0, MAX_PRIORITY), "Of two that could be evicted, the lower goes; 0 if unset.", int),
    scalar("preload", boolean(), "Load it when the service starts.", bool),
    words("aliases", "Other names that clients may use."),
    scalar("role", _ROLES, "What it is served for; where the header does not tell."),
)

MODEL_KEYS: Final = (
    scalar("context", whole_number(1, MAX_CONTEXT), "Tokens for each conversation; as PLANNER_CONTEXT_LENGTH.", int),
    scalar("slots", SLOTS, "Conversations at a time; as PLANNER_NUM_PARALLEL.", int, str),
    scalar("kv_cache_type", choice(*KV_CACHE_TYPES), "Type of the K and V caches; as PLANNER_KV_CACHE_TYPE."),
    scalar("flash_attention", choice("auto", "on", "off"), "As PLANNER_FLASH_ATTENTION."),
    scalar("cache_ram", size_in_mib(MAX_CACHE_RAM_MIB), "Host memory for idle prompts; as PLANNER_CACHE_RAM."),
    words("devices", "The devices that it may use, in this order.", device_name),
    scalar("draft", _TEXT, "The draft model for speculative decoding: a model's id, or a path."),
    Key(
        "projector",
        "a path, or false for none",
        _projector,
        "Its multimodal projector, where the file beside it is not the one.",
        {"type": ["string", "boolean"]},
    ),
    scalar("mtp", boolean(), "Speculate with the model's own prediction layers, where it has them.", bool),
    words("flags", "More flags of llama-server, each word a text. Those that the service owns are refused."),
    *_SCHEDULING,
    table("set", "Fields put into a request that lacks them.", _json_value, "a table of request fields"),
    table("force", "Fields put into every request.", _json_value, "a table of request fields"),
    words("strip", "Fields taken out of every request."),
)

DEFAULT_KEYS: Final = tuple(key for key in MODEL_KEYS if key.name not in {"aliases", "draft", "projector"})

EXTERNAL_KEYS: Final = (
    words("cmd", "The program and its arguments; {port} stands for a free port.", required=True),
    scalar("url", _TEXT, "Where it answers, such as http://127.0.0.1:{port}.", required=True),
    scalar(
        "health",
        _TEXT,
        "The path that answers 200 once it is ready, such as /health; asked while it serves too.",
        required=True,
    ),
    table(
        "memory",
        'What it takes on each device: CUDA0 = "6GiB", Host = "2GiB".',
        _device_size,
        "a table of sizes",
        required=True,
    ),
    table("env", "Variables for its environment.", text_value, "a table of texts"),
    scalar("folder", path(), "Its working folder."),
    scalar("slots", whole_number(1, MAX_SLOTS), "Requests that it serves at a time.", int),
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
