"""The interface of the store of models: what the gateway may ask of whoever keeps them on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

# What a Modelfile says that only Ollama's own service can heed: it names code of it, or a version.
FOR_OLLAMA: Final = ("renderer", "parser", "requires")


class StoreError(Exception):
    """The store could not do what was asked. The text is one line for the client: what is wrong, where, what to do."""


class BadModelName(StoreError):
    """The name is none that a store can hold, or a registry serve."""


class NotInStore(StoreError):
    """There is no model of this name to copy, delete or build on; no blob of this digest."""


class BadCreate(StoreError):
    """What was sent cannot be made into a model: a wrong digest, an unknown parameter, a file that is no GGUF."""


class RegistryFailed(StoreError):
    """The registry refused, has no such model, or cannot be reached."""


class StoreFull(StoreError):
    """The disk is full. Nothing that is not whole was left behind."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a pull or a create. ``status`` is Ollama's word for it; bytes are None where none are counted."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What a new model is made of: a parent's name, or files in the store as blobs (file name -> ``sha256:...``).

    ``modelfile`` is a Modelfile's text; the fields beside it win over what it says. None: as the parent has it.
    ``for_ollama`` is as in ``supervisor.api.models.Preset``.
    """

    model: str
    parent: str | None = None
    files: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    adapters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    modelfile: str | None = None
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    licenses: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    for_ollama: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    quantize: str | None = None


class Store(Protocol):
    """The models on disk as clients may change them. Every method raises a ``StoreError`` where it cannot.

    A model that is pulled or created is listed only once it is whole; whoever iterates to the end finds it there.
    Closing an iterator before its end stops the work; what was downloaded is kept to be resumed.
    """

    def pull(self, name: str, *, insecure: bool) -> AsyncIterator[Progress]:
        """Fetch a model from its registry; ``insecure`` allows HTTP without TLS."""
        ...

    def create(self, spec: CreateRequest) -> AsyncIterator[Progress]:
        """Make a model from a parent or from blobs."""
        ...

    async def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        ...

    async def delete(self, name: str) -> None:
        """Remove a model, and the blobs that no other one uses."""
        ...

    async def has_blob(self, digest: str) -> bool:
        """Say whether a blob (``sha256:`` and 64 hexadecimal digits) is there, whole."""
        ...

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> None:
        """Take a blob in. Nothing of it is left where its bytes have another digest, or end too early."""
        ...
