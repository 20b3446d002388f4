"""Ollama's ``options``: what loads a model goes to the planner, what samples goes to llama-server by its own names.

A name that is none of Ollama's is only logged, as Ollama does, so that a client written for another version keeps
working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import structlog

from planner.types import LoadOptions, Role
from supervisor.api.parameters import KINDS, Kind
from supervisor.gateway.errors import BadRequest

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


# Go's name of each kind, as it stands in error texts.
_EXPECTED: Final = {
    Kind.WHOLE: "of type integer",
    Kind.REAL: "of type float32",
    Kind.FLAG: "of type boolean",
    Kind.TEXTS: "of type array",
}
# Ollama's default of each sampling option, since llama-server's own differ (top_p 0.95, min_p 0.05).
DEFAULTS: Final[Mapping[str, Any]] = {
    "num_keep": 4,
    "seed": -1,
    "num_predict": -1,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "temperature": 0.8,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": (),
}
# llama-server's warm-up is a text's beginning and end in one batch (common/common.cpp); with less it aborts.
LEAST_BATCH: Final = 2
# What Go's int holds; an infinite number (1e999) is none either.
MAX_NUMBER: Final = 2**63
# Where llama-server calls it otherwise (tools/server/server-schema.cpp).
RENAMED: Final = {"num_keep": "n_keep", "num_predict": "n_predict"}


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


def of_preset(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's own parameters, those that are wrong left out: they must not make it unusable."""
    result: dict[str, Any] = {}
    for name, value in own.items():
        try:
            result |= checked({name: value})
        except BadRequest as error:
            _log.warning("options.preset_ignored", problem=str(error))
    return result


def load_options(options: Mapping[str, Any], role: Role) -> LoadOptions:
    """Return what these options ask of the load; a value that means "you decide" (num_gpu -1) is None.

    A model that embeds takes each input in one batch: a smaller one would only cut its inputs short.
    """
    n_batch = _positive(options.get("num_batch")) if role is Role.CHAT else None
    return LoadOptions(
        n_ctx=_positive(options.get("num_ctx")),
        n_gpu_layers=_natural(options.get("num_gpu")),
        main_gpu=_natural(options.get("main_gpu")),
        n_batch=None if n_batch is None else max(n_batch, LEAST_BATCH),
        use_mmap=options.get("use_mmap"),
    )


def sampling(options: Mapping[str, Any], n_ctx: int | None) -> dict[str, Any]:
    """Return the fields of a llama-server request. ``n_ctx`` is one conversation's, where it is known."""
    values = {name: options.get(name, default) for name, default in DEFAULTS.items()}
    values["stop"] = [stop for stop in values["stop"] if stop]
    if values["num_predict"] <= 0:  # Ollama: no limit; llama-server's 0 would be no token at all
        values["num_predict"] = -1
    if values["repeat_last_n"] < 0:  # the whole context
        values["repeat_last_n"] = n_ctx or DEFAULTS["repeat_last_n"]
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
    raise BadRequest(f'option "{name}" must be {_EXPECTED[kind]}', param="options")


def _natural(value: int | None) -> int | None:
    return value if value is not None and value >= 0 else None


def _positive(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None
