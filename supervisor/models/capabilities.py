"""What a model can do, in Ollama's words, as its header tells it."""

from __future__ import annotations

import re
from typing import Final

from planner.model import ModelFacts
from planner.types import Role
from supervisor.api.models import CHAT_TEMPLATE

# Keys by which llama.cpp knows a model's fill-in-the-middle tokens (src/llama-vocab.cpp, llama_vocab::impl::load). It
# also guesses them by the tokens' texts, which a reader of the header's scalars does not see.
_FILL_IN: Final = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")
_TOOLS: Final = re.compile(r"\btools\b|\btool_calls\b")
_THINKING: Final = re.compile(r"enable_thinking|reasoning_content|</?think(ing)?>|<\|channel\|>|\bthinking\b")


def capabilities(facts: ModelFacts, projector: ModelFacts | None = None) -> tuple[str, ...]:
    """Return completion, tools, insert, vision, audio, thinking as far as they hold, or embedding; nothing to rerank.

    Tools and thinking are those of the chat template in the header, which is the one that llama-server applies.
    """
    if facts.role is not Role.CHAT:
        return ("embedding",) if facts.role is Role.EMBEDDING else ()
    template = facts.metadata.get(CHAT_TEMPLATE)
    text = template if isinstance(template, str) else ""
    seen = projector.metadata if projector is not None else {}
    held = {
        "completion": True,
        "tools": _TOOLS.search(text) is not None,
        "insert": any(key in facts.metadata for key in _FILL_IN),
        "vision": seen.get("clip.has_vision_encoder") is True,  # tools/mtmd/clip-impl.h
        "audio": seen.get("clip.has_audio_encoder") is True,
        "thinking": _THINKING.search(text) is not None,
    }
    return tuple(name for name, holds in held.items() if holds)
