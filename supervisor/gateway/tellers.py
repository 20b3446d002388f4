"""Which API a path belongs to, and so in which envelope its errors are told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from supervisor.gateway import anthropic
from supervisor.gateway.anthropic import anthropic_answer_to
from supervisor.gateway.errors import ErrorTeller, answer_to
from supervisor.gateway.ollama import errors as ollama
from supervisor.gateway.ollama.errors import ollama_answer_to

# There are some forty endpoints; paths that are none are told of as well.
MAX_KNOWN_PATHS: Final = 128

TELLERS: Final[Mapping[str, ErrorTeller]] = {
    anthropic.PREFIX: anthropic_answer_to,
    ollama.PREFIX: ollama_answer_to,
}


@lru_cache(MAX_KNOWN_PATHS)
def teller_for(path: str) -> ErrorTeller:
    """Return what tells the errors of requests to this path; OpenAI's envelope is everybody else's."""
    return next((tell for prefix, tell in TELLERS.items() if path.startswith(prefix)), answer_to)
