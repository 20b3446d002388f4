"""What a model says to Ollama's own service alone, and what comes of it here: told when a model is brought in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

CHAT_TEMPLATE: Final = "tokenizer.chat_template"
FORMS: Final = ("renderer", "parser")  # how a prompt is written, and how an answer is read


def not_heeded(for_ollama: Mapping[str, str], metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that is not heeded. ``metadata`` are of the model's header."""
    forms = " and ".join(f"{name.upper()} {for_ollama[name]}" for name in FORMS if name in for_ollama)
    if forms:
        instead = (
            "the chat template in the model's header is applied instead, and TEMPLATE is left aside"
            if CHAT_TEMPLATE in metadata
            else "the model's header has no chat template, so llama-server speaks ChatML to it, which it may not "
            "understand: create it again from this one with a TEMPLATE of its own"
        )
        yield f"not heeded: {forms}, which is code within Ollama; {instead}"
    if "requires" in for_ollama:
        yield (
            f"not heeded: REQUIRES {for_ollama['requires']}, which is a version of Ollama; whether llama-server knows "
            "the model is seen when it is loaded"
        )
