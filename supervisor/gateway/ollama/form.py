"""The form in which a conversation reaches the model: in the template of its header, or in a Modelfile's.

llama-server applies the header's itself and takes apart what the model says: thoughts and tool calls. A Modelfile's is
rendered here, and the answer is taken as text; so it is used where neither tools nor thoughts nor images are about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import structlog
from anyio import to_thread

from supervisor.api.models import ModelView
from supervisor.gateway.ollama.answer import ChatReader, CompletionReader
from supervisor.gateway.ollama.chat import Common, chat_body
from supervisor.gateway.ollama.generate import GenerateRequest, completion_body
from supervisor.gateway.ollama.messages import ASSISTANT, Message
from supervisor.gateway.ollama.runner import Runner
from supervisor.gateway.ollama.template import PLAIN_TEMPLATE, Template, read_template
from supervisor.go_template.nodes import TemplateError

CHAT_PATH: Final = "/v1/chat/completions"
COMPLETION_PATH: Final = "/completion"

Messages = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]
Reader = ChatReader | CompletionReader

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("loadmaster.ollama")


class Form(Protocol):
    """How a conversation is sent, and its answer read."""

    @property
    def path(self) -> str:
        """Return where llama-server takes it."""
        ...

    async def body(self, messages: Messages) -> dict[str, Any]:
        """Return the body to send there."""
        ...

    def reader(self, messages: Messages) -> Reader:
        """Return what reads the answer's events."""
        ...

    async def text(self, runner: Runner, messages: Messages) -> str:
        """Return the text that the model goes on from."""
        ...

    async def count(self, runner: Runner, messages: Messages) -> int:
        """Return the tokens that the conversation takes."""
        ...


@dataclass(frozen=True, slots=True)
class HeadersForm:
    """The template in the model's header, applied by llama-server."""

    common: Common
    tools: Tools
    sampling: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Return where llama-server takes it."""
        return CHAT_PATH

    async def body(self, messages: Messages) -> dict[str, Any]:
        """Return the body to send there."""
        return chat_body(messages, self.tools, self.common, self.sampling)

    def reader(self, messages: Messages) -> Reader:
        """Return what reads the answer's events."""
        last = messages[-1]
        return ChatReader(self.common.n_top, continued=last.content if last.role == ASSISTANT else "")

    async def text(self, runner: Runner, messages: Messages) -> str:
        """Return the text that the model goes on from."""
        return str((await runner.ask("/apply-template", await self.body(messages)))["prompt"])

    async def count(self, runner: Runner, messages: Messages) -> int:
        """Return the tokens that the conversation takes."""
        return int((await runner.ask(f"{CHAT_PATH}/input_tokens", await self.body(messages)))["input_tokens"])


@dataclass(slots=True)
class ModelfilesForm:
    """A Modelfile's template, rendered here: beside the event loop, since a template may take its time."""

    template: Template
    common: Common
    sampling: Mapping[str, Any]
    _rendered: tuple[Messages, str]  # the latest

    @property
    def path(self) -> str:
        """Return where llama-server takes it."""
        return COMPLETION_PATH

    async def body(self, messages: Messages) -> dict[str, Any]:
        """Return the body to send there."""
        return completion_body(await self._text(messages), self.common, self.sampling)

    def reader(self, _messages: Messages) -> Reader:
        """Return what reads the answer's events."""
        return CompletionReader(self.common.n_top)

    async def text(self, _runner: Runner, messages: Messages) -> str:
        """Return the text that the model goes on from."""
        return await self._text(messages)

    async def count(self, runner: Runner, messages: Messages) -> int:
        """Return the tokens that the conversation takes."""
        return len(await tokens_of(runner, await self._text(messages)))

    async def _text(self, messages: Messages) -> str:
        if self._rendered[0] is not messages:
            text = await to_thread.run_sync(partial(self.template.conversation, messages, think=self.common.think))
            self._rendered = messages, text
        return self._rendered[1]


async def tokens_of(runner: Runner, text: str, *, begins: bool = True) -> list[int]:
    """Return the tokens of a text in which control tokens may stand; ``begins`` where nothing is before it."""
    words = {"content": text, "add_special": begins, "parse_special": True}
    return list((await runner.ask("/tokenize", words))["tokens"])


async def form_of(
    model: ModelView,
    common: Common,
    messages: Messages,
    sampling: Mapping[str, Any],
    *,
    tools: Tools = (),
    own: str = "",
) -> Form:
    """Return the form for this conversation. ``own`` is the template that the request brought along, if any."""
    if not (own or model.has_chat_template or model.preset.template or model.preset.for_ollama):
        own = PLAIN_TEMPLATE
    written = None if tools else await written_by_modelfile(model, messages, think=common.think, own=own)
    if written is None:
        return HeadersForm(common, tools, sampling)
    template, text = written
    return ModelfilesForm(template, common, sampling, (messages, text))


async def written_by_modelfile(
    model: ModelView, messages: Messages, *, think: bool | str | None, own: str = ""
) -> tuple[Template, str] | None:
    """Return the Modelfile's template and the conversation in it; None where the header's is to be applied.

    A Modelfile's template that cannot be used is logged. ``own`` is as in ``form_of``; for that ``TemplateError`` is
    raised.
    """
    wanted = own or model.preset.spoken_template
    if not wanted or any(one.images for one in messages):
        return None
    if not own and ("thinking" in model.capabilities or any(one.tool_calls for one in messages)):
        return None
    try:
        template = read_template(wanted)
        return template, await to_thread.run_sync(partial(template.conversation, messages, think=think))
    except TemplateError as error:
        if own:
            raise
        _log_unusable(model, error)
        return None


async def inserted_text(model: ModelView, asked: GenerateRequest) -> str | None:
    """Return the text that asks for what belongs between prompt and suffix, None where no template says how."""
    wanted = asked.template or model.preset.spoken_template
    try:
        template = read_template(wanted) if wanted else None
        if template is None or not template.inserts:
            return None
        return await to_thread.run_sync(template.infill, asked.prompt, asked.suffix)
    except TemplateError as error:
        if asked.template:
            raise
        _log_unusable(model, error)
        return None


def _log_unusable(model: ModelView, error: TemplateError) -> None:
    _log.warning("template.not_used", model=model.id, problem=str(error), instead="the model's own")
