"""A model's parameters by Ollama's names, and the kind of value of each (api/types.go, ``Options`` and ``Runner``)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Kind(Enum):
    """What a parameter's value is."""

    WHOLE = "integer"
    REAL = "float"
    FLAG = "boolean"
    TEXTS = "texts"


# What loads a model.
LOADING: Final[Mapping[str, Kind]] = {
    "num_ctx": Kind.WHOLE,
    "num_batch": Kind.WHOLE,
    "num_gpu": Kind.WHOLE,
    "main_gpu": Kind.WHOLE,
    "use_mmap": Kind.FLAG,
}
# What makes an answer.
SAMPLING: Final[Mapping[str, Kind]] = {
    "num_keep": Kind.WHOLE,
    "seed": Kind.WHOLE,
    "num_predict": Kind.WHOLE,
    "top_k": Kind.WHOLE,
    "top_p": Kind.REAL,
    "min_p": Kind.REAL,
    "typical_p": Kind.REAL,
    "repeat_last_n": Kind.WHOLE,
    "temperature": Kind.REAL,
    "repeat_penalty": Kind.REAL,
    "presence_penalty": Kind.REAL,
    "frequency_penalty": Kind.REAL,
    "stop": Kind.TEXTS,
}
# Known to Ollama, and decided by us: llama-server's threads are a setting of the service.
DECIDED_HERE: Final[Mapping[str, Kind]] = {"num_thread": Kind.WHOLE, "draft_num_predict": Kind.WHOLE}
KINDS: Final[Mapping[str, Kind]] = {**LOADING, **SAMPLING, **DECIDED_HERE}
