"""The runtime's interface: what the gateway, the status pages and the tests may know of the supervisor.

Nothing here decides. A request acquires a ``Lease`` on a runner's endpoint and gives it back exactly once; everything
else is read from one immutable ``Snapshot``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Protocol

from planner.types import Decision, Machine, Role, Shortfall


class Fault(StrEnum):
    """Whose fault an error is; ``gateway.errors`` maps it to a status."""

    CALLER = "caller"
    US = "us"
    RUNNER = "runner"
    HARDWARE = "hardware"
    UPSTREAM = "upstream"


class AcquireError(Exception):
    """No lease was granted. The text is one line that says what is wrong, where, and what to do.

    ``retry_after_s`` is None where trying again cannot help.
    """

    fault = Fault.US

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownModel(AcquireError):
    """The name is not in the folder; ``closest`` are names that are, best first."""

    fault = Fault.CALLER

    def __init__(self, message: str, *, closest: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.closest = closest


class UnknownDevice(AcquireError):
    """This machine has no device of that name."""

    fault = Fault.CALLER


class WrongRole(AcquireError):
    """The model is served for another role than the request needs."""

    fault = Fault.CALLER


class BadModel(AcquireError):
    """The model file is in the folder but cannot be read or is refused by llama.cpp."""

    fault = Fault.CALLER


class CannotFit(AcquireError):
    """The model does not fit. ``never`` says that it would not fit on an empty machine either."""

    fault = Fault.HARDWARE

    def __init__(
        self, message: str, *, causes: tuple[Shortfall, ...], never: bool, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.causes = causes
        self.never = never


class QueueFull(AcquireError):
    """As many requests wait already as MAX_QUEUE allows."""


class ClientLimit(AcquireError):
    """This client has as many requests waiting as CLIENT_QUEUE allows; others are still welcome."""

    fault = Fault.CALLER


class LoadTimeout(AcquireError):
    """The runner was not ready within LOAD_TIMEOUT, or no slot came free within QUEUE_TIMEOUT."""

    fault = Fault.RUNNER


class LoadFailed(AcquireError):
    """The runner died while loading; the text ends with its last error line."""

    fault = Fault.RUNNER


class PlannerFailed(AcquireError):
    """The planner itself failed, which is a defect of ours; the text says how."""


class ShuttingDown(AcquireError):
    """The service is draining and takes no new work."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a runner answers, and the key that it asks for."""

    base_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What a request asks of the load itself; None: as the settings have it.

    ``n_ctx`` is tokens for one conversation; a runner that has as many serves it. The others are llama-server's own.
    """

    n_ctx: int | None = None
    n_gpu_layers: int | None = None
    main_gpu: int | None = None
    n_batch: int | None = None
    use_mmap: bool | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks beside the model and its role.

    ``client`` is who asks (the name of its key, else its address): the queue is fair between clients.
    ``keep_alive_s`` is how long the runner stays once it is idle: ``math.inf`` for ever, None as it is set already.
    """

    client: str = ""
    keep_alive_s: float | None = None
    load: LoadOptions = LoadOptions()


NO_NEED: Final = Need()


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Where a model's load stands. ``stage`` is a word for people; ``fraction`` of the weights read, where known."""

    stage: str
    fraction: float | None
    waited_s: float


@dataclass(frozen=True, slots=True)
class YieldResult:
    """What came of freeing memory for another program.

    ``freed_bytes`` is what our runners gave back for it, ``free_bytes`` what the driver calls free now and
    ``short_bytes`` how much less that is than was wanted (None: it does not say). ``awaited_bytes`` is what runners in
    use will give back, by model: they take up no new request, and go when they have finished. ``until`` is the moment,
    in seconds since the epoch, up to which nothing of ours is placed there.
    """

    device: str
    freed_bytes: int
    free_bytes: int | None
    short_bytes: int | None
    awaited_bytes: Mapping[str, int]
    until: float


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
class FailureView:
    """How a runner last failed. ``at`` is seconds since the epoch, ``exit`` e.g. ``killed by SIGKILL``."""

    at: float
    reason: str
    exit: str | None
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Planned and measured bytes of one runner on one device; None where not known (yet)."""

    device: str
    planned_bytes: int | None
    measured_bytes: int | None


@dataclass(frozen=True, slots=True)
class DeviceLedger:
    """One device's account: what its driver calls free, and what of it is or was our runners'.

    ``held_bytes`` is what our runners hold, ``promised_bytes`` the part of it that loads are about to take,
    ``settling_bytes`` what was given back so lately that the driver may still show it as used, ``cap_bytes`` the most
    that they may hold while memory is another program's (None: no limit), ``difference_bytes`` what they turned out to
    hold beyond their plans (None: not measured).
    """

    device: str
    free_bytes: int | None
    held_bytes: int
    promised_bytes: int
    settling_bytes: int
    cap_bytes: int | None
    difference_bytes: int | None


@dataclass(frozen=True, slots=True)
class RunnerView:
    """One runner as it is at this moment. ``state`` is a value of ``supervisor.core.runner.RunnerState``.

    ``expires_at`` is when it is unloaded if nobody asks, None where it stays for ever or is not idle. ``keep_alive_s``
    is how long it stays once it is idle, ``math.inf`` for ever.
    ``plan`` is what ``planner explain --json`` prints, ``remedies`` what was changed since it ran out of memory. Times
    are seconds since the epoch.
    """

    id: str
    model: str
    role: Role
    state: str
    pid: int | None
    url: str | None
    since: float
    in_flight: int
    waiting: int
    restarts: int
    n_ctx_per_slot: int | None
    n_parallel: int | None
    expires_at: float | None
    keep_alive_s: float
    retry_at: float | None
    load_seconds: float | None
    plan: Mapping[str, Any] | None
    uses: tuple[DeviceUse, ...]
    last_failure: FailureView | None
    remedies: tuple[Decision, ...] = ()


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


@dataclass(frozen=True, slots=True)
class ModelCounters:
    """What happened to one model since the service started. ``unloads`` counts ``evictions`` too."""

    launches: int = 0
    crashes: int = 0
    load_failures: int = 0
    requests_granted: int = 0
    requests_refused: int = 0
    unloads: int = 0
    evictions: int = 0
    out_of_memory: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the status endpoints tell, at one moment. Building it never wakes or loads anything."""

    version: str
    started_at: float
    now: float
    draining: bool
    not_ready: tuple[str, ...]  # reasons why /readyz is 503; empty: ready
    llama_server: str | None
    llama_version: str | None
    machine: Machine | None
    runners: tuple[RunnerView, ...]
    models: tuple[ModelView, ...]
    queue_length: int
    queue_limit: int
    counters: Mapping[str, ModelCounters] = field(default_factory=lambda: MappingProxyType({}))
    warnings: tuple[str, ...] = ()
    ledger: tuple[DeviceLedger, ...] = ()


class Runtime(Protocol):
    """What the gateway may ask of the supervisor."""

    def snapshot(self) -> Snapshot:
        """Return the state of everything, at once."""
        ...

    async def resolve(self, name: str) -> str:
        """Return the public id of the model that a client's name stands for, at no cost where it is known.

        Raises UnknownModel, with the closest ids, once the folder was read again and has none of that name.
        """
        ...

    def model(self, model: str) -> ModelView:
        """Return one model as a snapshot has it, at the cost of one. Raises UnknownModel where it has gone."""
        ...

    def acquire(self, model: str, role: Role, need: Need = NO_NEED) -> AbstractAsyncContextManager[Lease]:
        """Return a context manager that waits for a lease on a runner of this model, loading it where need be.

        Entering raises an ``AcquireError`` where none can be granted. Cancelling while it waits takes the request out
        of the queue; a load that it caused goes on.
        """
        ...

    async def unload(self, model: str) -> bool:
        """Let the model's runner finish what it serves, stop it, and return once its child is gone.

        False where nothing was loaded. What waits for the model, or asks for it later, loads it again.
        """
        ...

    def reset(self, model: str) -> bool:
        """Let a runner that failed or backs off be tried again at once; False where there was nothing to forgive."""
        ...

    def progress(self, model: str) -> LoadProgress | None:
        """Return where the model's load stands, None where none is under way."""
        ...

    async def yield_memory(self, device: str, wanted_bytes: int, for_s: float) -> YieldResult:
        """Stop the cheapest runners until so much is free on a device, and place nothing there for so long.

        Returns once those that were idle are gone, and does not wait for those in use. Raises UnknownDevice.
        """
        ...

    async def rescan(self) -> None:
        """Read the models again, now."""
        ...

    async def details(self, model: str, *, whole: bool = False) -> Mapping[str, Any]:
        """Return ``{"metadata": {...}, "tensors": [{"name", "type", "shape"}], "projector": metadata or None}``.

        So say the headers of the model and of its projector. Arrays too long to be kept (vocabularies) are None, or
        ``JsonText`` where the ``whole`` is wanted. Raises UnknownModel, BadModel, PlannerFailed.
        """
        ...

    def log_lines(self, model: str, *, follow: bool) -> AsyncGenerator[str, None]:
        """Yield the last lines that the model's runner logged; with ``follow`` what it says from then on, to its end.

        Raises UnknownModel where no runner of it has said anything.
        """
        ...
