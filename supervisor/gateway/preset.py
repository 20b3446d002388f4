"""What a Modelfile says of its model, in requests of OpenAI's API and Anthropic's, as Ollama holds to it there too.

It counts where a request says nothing of its own. Its template is ``supervisor.gateway.templated``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from planner.types import LoadOptions, Role
from supervisor.api.models import Preset
from supervisor.api.parameters import SAMPLING
from supervisor.gateway.ollama.options import RENAMED, load_options, of_preset

# Where a system prompt is a message, and where it is a field.
_CONVERSATIONS: Final = frozenset({"/v1/chat/completions", "/v1/chat/completions/input_tokens", "/apply-template"})
_SYSTEM_FIELDS: Final[Mapping[str, str]] = {
    "/v1/messages": "system",
    "/v1/messages/count_tokens": "system",
    "/v1/responses": "instructions",
    "/v1/responses/input_tokens": "instructions",
}
_GENERATING: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
_N_PREDICT: Final = RENAMED["num_predict"]
# By any of these names a request says itself how long its answer may be.
_LENGTHS: Final = frozenset({_N_PREDICT, "max_tokens", "max_completion_tokens", "max_output_tokens"})


def is_spoken(preset: Preset) -> bool:
    """Say whether there is anything to be held to."""
    return bool(preset.system or preset.messages or preset.parameters)


def loaded_by(preset: Preset, asked: LoadOptions, role: Role) -> LoadOptions:
    """Return what the load is to be like: as the request wants it, else as the Modelfile."""
    if not preset.parameters:
        return asked
    own = load_options(of_preset(preset.parameters), role)
    return own if asked.n_ctx is None else replace(own, n_ctx=asked.n_ctx)


def with_preset(path: str, body: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """Return the body of a request to this path with what the Modelfile adds to it."""
    told = dict(body)
    if path in _GENERATING:
        told = _sampling(preset.parameters, body) | told
    if path in _CONVERSATIONS and isinstance(body.get("messages"), list):
        told["messages"] = _conversation(preset, body["messages"])
    elif (field := _SYSTEM_FIELDS.get(path)) and preset.system:
        told.setdefault(field, preset.system)
    return told


def _sampling(parameters: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters by llama-server's names, the length left out where the request has its own."""
    own = {name: value for name, value in of_preset(parameters).items() if name in SAMPLING}
    named = {RENAMED.get(name, name): value for name, value in own.items()}
    if _LENGTHS & body.keys() or named.get(_N_PREDICT, 0) <= 0:  # zero and below: no limit, with Ollama
        named.pop(_N_PREDICT, None)
    return named


def _conversation(preset: Preset, messages: list[Any]) -> list[Any]:
    told = [dict(message) for message in preset.messages] + messages
    first = messages[0] if messages else None
    if not preset.system or (isinstance(first, dict) and first.get("role") in _SYSTEM_ROLES):
        return told
    return [{"role": "system", "content": preset.system}, *told]
