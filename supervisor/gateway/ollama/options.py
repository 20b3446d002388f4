"""Ollama's ``options``: what loads a model goes to the planner, what samples goes to llama-server by its own names.

Names and types are those of api/types.go, ``Options`` and ``Runner``; a name that is not among them is only logged, as
Ollama does, so that a client written for another version keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

import structlog

from supervisor.api import LoadOptions
from supervisor.gateway.errors import BadRequest

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


class Kind(Enum):
    """What an option's value has to be; the value is Ollama's word for it."""

    WHOLE = "of type integer"
    REAL = "of type float32"
    FLAG = "of type boolean"
    TEXTS = "of type array"


LOAD_OPTIONS: Final[Mapping[str, Kind]] = {
    "num_ctx": Kind.WHOLE,
    "num_batch": Kind.WHOLE,
    "num_gpu": Kind.WHOLE,
    "main_gpu": Kind.WHOLE,
    "use_mmap": Kind.FLAG,
}
# Ollama's default of each, since llama-server's own differ (top_p 0.95, min_p 0.05).
SAMPLING_OPTIONS: Final[Mapping[str, tuple[Kind, Any]]] = {
    "num_keep": (Kind.WHOLE, 4),
    "seed": (Kind.WHOLE, -1),
    "num_predict": (Kind.WHOLE, -1),
    "top_k": (Kind.WHOLE, 40),
    "top_p": (Kind.REAL, 0.9),
    "min_p": (Kind.REAL, 0.0),
    "typical_p": (Kind.REAL, 1.0),
    "repeat_last_n": (Kind.WHOLE, 64),
    "temperature": (Kind.REAL, 0.8),
    "repeat_penalty": (Kind.REAL, 1.0),
    "presence_penalty": (Kind.REAL, 0.0),
    "frequency_penalty": (Kind.REAL, 0.0),
    "stop": (Kind.TEXTS, ()),
}
# Known to Ollama, and decided by us: llama-server's threads are a setting of the service.
NOT_OURS: Final[Mapping[str, Kind]] = {"num_thread": Kind.WHOLE, "draft_num_predict": Kind.WHOLE}
# What Go's int holds; an infinite number (1e999) is none either.
MAX_NUMBER: Final = 2**63
# Where llama-server calls it otherwise (tools/server/server-schema.cpp).
RENAMED: Final = {"num_keep": "n_keep", "num_predict": "n_predict"}

KINDS: Final = {**LOAD_OPTIONS, **NOT_OURS, **{name: kind for name, (kind, _) in SAMPLING_OPTIONS.items()}}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that there are, each of its type. Raises ``BadRequest`` for a value of another one."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        kind = KINDS.get(name)
        if kind is None:
            _log.warning("options.unknown", option=name[:100])
        elif value is not None:
            result[name] = _value(name, kind, value)
    return result


def of_preset(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's own parameters, those that are wrong left out: they must not make it unusable."""
    result: dict[str, Any] = {}
    for name, value in parameters.items():
        try:
            result |= checked({name: value})
        except BadRequest as error:
            _log.warning("options.preset_ignored", problem=str(error))
    return result


def load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Return what these options ask of the load; a value that means "you decide" (num_gpu -1) is None."""
    return LoadOptions(
        n_ctx=_positive(options.get("num_ctx")),
        n_gpu_layers=layers if (layers := options.get("num_gpu")) is not None and layers >= 0 else None,
        main_gpu=options.get("main_gpu"),
        n_batch=_positive(options.get("num_batch")),
        use_mmap=options.get("use_mmap"),
    )


def sampling(options: Mapping[str, Any], n_ctx: int | None) -> dict[str, Any]:
    """Return the fields of a llama-server request. ``n_ctx`` is one conversation's, where it is known."""
    values = {name: options.get(name, default) for name, (_, default) in SAMPLING_OPTIONS.items()}
    values["stop"] = [stop for stop in values["stop"] if stop]
    if values["num_predict"] <= 0:  # Ollama: no limit; llama-server's 0 would be no token at all
        values["num_predict"] = -1
    if values["repeat_last_n"] < 0:  # the whole context
        values["repeat_last_n"] = n_ctx or SAMPLING_OPTIONS["repeat_last_n"][1]
    return {RENAMED.get(name, name): value for name, value in values.items()}


def _value(name: str, kind: Kind, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
    match kind:
        case Kind.WHOLE if number:
            return int(value)
        case Kind.REAL if number:
            return float(value)
        case Kind.FLAG if isinstance(value, bool):
            return value
        case Kind.TEXTS if isinstance(value, list | tuple):
            if not all(isinstance(one, str) for one in value):
                raise BadRequest(f'option "{name}" must be of an array of strings', param="options")
            return list(value)
    raise BadRequest(f'option "{name}" must be {kind.value}', param="options")


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None
