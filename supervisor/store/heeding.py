"""What a model says that is not heeded here, and what comes of it: told when a model is brought in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from supervisor.api.models import CHAT_TEMPLATE, Preset
from supervisor.go_template.nodes import TemplateError
from supervisor.go_template.syntax import parse

FORMS: Final = ("renderer", "parser")  # how a prompt is written, and how an answer is read


def not_heeded(preset: Preset, metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that is not heeded. ``metadata`` are of the model's header."""
    for_ollama = preset.for_ollama
    try:
        parse(preset.spoken_template or "")
    except TemplateError as error:
        yield f"not heeded: TEMPLATE, which cannot be used ({error}); {_instead(metadata)}"
    forms = " and ".join(f"{name.upper()} {for_ollama[name]}" for name in FORMS if name in for_ollama)
    if forms:
        yield f"not heeded: {forms}, which is code within Ollama, and TEMPLATE beside it; {_instead(metadata)}"
    if "requires" in for_ollama:
        yield (
            f"not heeded: REQUIRES {for_ollama['requires']}, which is a version of Ollama; whether llama-server knows "
            "the model is seen when it is loaded"
        )


def _instead(metadata: Mapping[str, Any]) -> str:
    if CHAT_TEMPLATE in metadata:
        return "the chat template in the model's header is applied instead"
    return (
        "the model's header has no chat template, so llama-server speaks ChatML to it, which it may not understand: "
        "create a model from this one with a TEMPLATE of its own"
    )
