"""The models that can be asked for, as clients may see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from planner.types import Role

CHAT_TEMPLATE: Final = "tokenizer.chat_template"  # under which a header says how a conversation is written


@dataclass(frozen=True, slots=True)
class Preset:
    """What a Modelfile adds to a model: how it is spoken to. ``parameters`` are request defaults by Ollama's names.

    ``for_ollama`` is what only Ollama's own service can heed, by its names: renderer, parser, requires.
    """

    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    messages: tuple[Mapping[str, str], ...] = ()
    licenses: tuple[str, ...] = ()
    parent: str | None = None
    for_ollama: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def spoken_template(self) -> str | None:
        """Return the template that prompts are written in; None: the one in the header, which llama-server applies.

        Where a renderer or a parser is named, the template is none that anybody was meant to use: Ollama does not.
        """
        return None if {"renderer", "parser"} & self.for_ollama.keys() else self.template


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model that can be asked for. ``problem`` is the line that says why it cannot be served, where it cannot.

    ``digest`` tells versions of one name apart: the sha256 of a store's manifest, of name, size and time of a file.
    ``capabilities`` are Ollama's words: completion, tools, insert, vision, audio, embedding, thinking.
    ``runner`` is the model under which its runner is listed: itself (empty, too), or another name for the same files.
    ``mmproj`` and ``adapters`` are the files that are loaded with it.
    ``has_chat_template``: the header says how a conversation is written; where it does not, llama-server writes ChatML.
    """

    id: str
    path: str
    role: Role
    architecture: str | None
    file_bytes: int
    modified_at: float
    n_ctx_train: int | None
    n_ctx_per_slot: int | None
    problem: str | None = None
    digest: str = ""
    quantization: str | None = None
    n_params: int | None = None
    n_embd: int | None = None
    capabilities: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    preset: Preset = Preset()
    runner: str = ""
    has_chat_template: bool = True
    mmproj: str | None = None
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JsonText:
    """A value that is JSON already: one so long that writing it takes time in which others would have to wait."""

    text: bytes
