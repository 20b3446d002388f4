"""What the service and its planning process say to each other: pickled values, each behind its length."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from config.model_settings import ExternalRunner
from planner.types import LearnedOverhead, LlamaBuild, Machine, PlanRequest
from supervisor.core.types import Cap, ModelId, Neighbour, PlanOutcome
from supervisor.models.catalogue import ModelEntry
from supervisor.store.folder import StoreFolder

LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Situation:
    """What our runners do to the machine that is looked at: hold by device, part of it ``promised``, or ``gone``.

    ``known`` is the machine as it was last told: a worker that had to be replaced learns the names of what is in use.
    """

    known: Machine | None
    held: Mapping[str, int]
    promised: Mapping[str, int]
    gone: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LookAround:
    """Ask what machine this is and which llama-server it has; answered by ``Surroundings``.

    ``lightly``: only to show it. Then nothing is woken, and neither llama-server nor an RPC worker is asked.
    """

    situation: Situation
    lightly: bool = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The machine and the llama-server that would be launched; ``not_found`` is the line where there is none."""

    machine: Machine
    llama: LlamaBuild
    not_found: str | None


@dataclass(frozen=True, slots=True)
class ScanModels:
    """Ask for the models below a folder and in a store; answered by a tuple of ``ModelEntry``, or by ``Failed``.

    The folder need not be there where there is a store and ``folder_optional`` says so.
    """

    folder: Path
    store: StoreFolder | None = None
    folder_optional: bool = False


@dataclass(frozen=True, slots=True)
class ReadDetails:
    """Ask for what the headers of a model and of its projector say; answered by ``Details``, or by ``Failed``.

    ``whole``: vocabularies too.
    """

    path: str
    mmproj: str | None
    whole: bool


@dataclass(frozen=True, slots=True)
class Details:
    """Metadata as ``supervisor.api.runtime.Runtime.details`` has them, and the tensors as name, type and shape."""

    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    projector: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Ask for a plan; answered by ``PlanAnswer``. See ``supervisor.core.commands.PlanModel``.

    ``learned`` is what runners turned out to take beside llama.cpp's buffers, by device.
    """

    model: ModelId
    path: str
    asked: PlanRequest | ExternalRunner
    situation: Situation
    neighbours: tuple[Neighbour, ...]
    surplus: int
    caps: tuple[Cap, ...]
    margins: Mapping[str, int]
    learned: Mapping[str, LearnedOverhead]


@dataclass(frozen=True, slots=True)
class LookAhead:
    """Tell that a plan will be asked for in this situation, most likely: the machine may be looked at already.

    It is not answered.
    """

    situation: Situation


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """A plan or why there is none, and what it was made for."""

    outcome: PlanOutcome
    surroundings: Surroundings


@dataclass(frozen=True, slots=True)
class Failed:
    """The question could not be answered; one line."""

    reason: str


Question = LookAround | ScanModels | ReadDetails | MakePlan
Answer = Surroundings | tuple[ModelEntry, ...] | Details | PlanAnswer | Failed


def read_message(stream: BinaryIO) -> bytes | None:
    """Return the next message, None at the end."""
    head = stream.read(LENGTH_BYTES)
    return stream.read(int.from_bytes(head, "little")) if len(head) == LENGTH_BYTES else None


def pack(value: Question | LookAhead | Answer) -> bytes:
    """Return a message: length, then the pickled value."""
    body = io.BytesIO()
    pickler = pickle.Pickler(body)
    # the planner's values hold read-only mappings, which pickle does not know
    pickler.dispatch_table = {**copyreg.dispatch_table, MappingProxyType: lambda view: (read_only, (dict(view),))}
    pickler.dump(value)
    return body.tell().to_bytes(LENGTH_BYTES, "little") + body.getvalue()


def read_only(mapping: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a read-only view; named, since a pickle has to name what restores it."""
    return MappingProxyType(mapping)
