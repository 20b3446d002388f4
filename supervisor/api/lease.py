"""What a request is granted: a runner's endpoint, and what the operator changes on the way there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a runner answers, and the key that it asks for."""

    base_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Amendments:
    """What the operator changes in every request to a model, by the body's fields: for want of them, always, never."""

    set: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    force: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    strip: tuple[str, ...] = ()

    def applied(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body as it is to be sent."""
        kept = {name: value for name, value in body.items() if name not in self.strip}
        return {**self.set, **kept, **self.force}

    def in_words(self, words: Mapping[str, str]) -> Amendments:
        """Return the same for a body whose fields have these other names."""
        return Amendments(
            {words.get(name, name): value for name, value in self.set.items()},
            {words.get(name, name): value for name, value in self.force.items()},
            tuple(words.get(name, name) for name in self.strip),
        )


class Lease(Protocol):
    """A grant to send one request to a runner. Leaving the context gives it back, exactly once."""

    @property
    def endpoint(self) -> Endpoint:
        """Where to send the request."""
        ...

    @property
    def model(self) -> str:
        """Return the public id of the model."""
        ...

    @property
    def amendments(self) -> Amendments | None:
        """Return what is to be changed in the request; None: nothing, it goes on byte for byte."""
        ...

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """Have this told one line of the story as soon as the runner behind this lease has died."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """A lease that can be had in this moment: what it will say, and how to ``take`` it, as a context to be left."""

    endpoint: Endpoint
    amendments: Amendments | None
    take: Callable[[], AbstractContextManager[Lease]]
