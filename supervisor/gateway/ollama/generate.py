"""``/api/generate``: what is asked, and the request to llama-server that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from supervisor.api.models import Preset
from supervisor.gateway.ollama.answer import Piece
from supervisor.gateway.ollama.chat import Common, read_common
from supervisor.gateway.ollama.errors import RAW_EXCLUDES, RAW_WITHOUT_IMAGES, OllamaError
from supervisor.gateway.ollama.fields import Fields
from supervisor.gateway.ollama.messages import SYSTEM, USER, Message, preset_messages, read_images


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to ``/api/generate``. Without a prompt it only loads the model, or unloads it.

    ``context`` are the tokens of an earlier answer that this one goes on from.
    """

    common: Common
    prompt: str
    suffix: str
    system: str
    template: str
    context: tuple[int, ...]
    raw: bool
    images: tuple[str, ...]


def read_generate(fields: Fields) -> GenerateRequest:
    """Return what is asked. Raises ``BadRequest``, ``OllamaError``."""
    asked = GenerateRequest(
        common=read_common(fields),
        prompt=fields.text("prompt"),
        suffix=fields.text("suffix"),
        system=fields.text("system"),
        template=fields.text("template"),
        context=fields.numbers("context"),
        raw=bool(fields.flag("raw")),
        images=read_images(fields),
    )
    if asked.raw and (asked.template or asked.system or asked.context):
        raise OllamaError(400, RAW_EXCLUDES)
    if asked.raw and asked.images:
        raise OllamaError(400, RAW_WITHOUT_IMAGES)
    return asked


def as_conversation(asked: GenerateRequest, preset: Preset) -> tuple[Message, ...]:
    """Return the prompt as a conversation: the system prompt, what the model brings along, and the prompt itself."""
    system = asked.system or preset.system
    first = (Message(SYSTEM, system),) if system else ()
    brought = () if asked.context else preset_messages(preset.messages)
    return (*first, *brought, Message(USER, asked.prompt, images=asked.images))


def completion_body(prompt: str | list[Any], common: Common, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for llama-server's ``/completion``. A prompt may mix tokens and text."""
    return {**sampling, "prompt": prompt, **_constraints(common)}


def infill_body(asked: GenerateRequest, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for llama-server's ``/infill``, which puts the model's own fill-in-the-middle tokens around."""
    return {
        **sampling,
        "input_prefix": asked.prompt,
        "input_suffix": asked.suffix,
        **_constraints(asked.common),
    }


def part(piece: Piece) -> dict[str, Any]:
    """Return a piece of the answer as a generate's ``response``."""
    return {"response": piece.text} | ({"thinking": piece.thinking} if piece.thinking else {})


def _constraints(common: Common) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if common.schema is not None:
        fields["json_schema"] = common.schema
    if common.logprobs:
        fields["n_probs"] = max(1, common.n_top)
    return fields
