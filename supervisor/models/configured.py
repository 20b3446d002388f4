"""The models file applied: which names a model answers to, what its runner is started with, how it is scheduled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from config.model_settings import ExternalRunner, ModelSettings, ModelsFile
from planner.types import Role
from supervisor.api.lease import Amendments
from supervisor.core import types as core
from supervisor.core.types import ModelId
from supervisor.models.catalogue import Catalogue, ModelEntry


def apply(file: ModelsFile, entries: Iterable[ModelEntry]) -> tuple[ModelEntry, ...]:
    """Return the models that were found, with what the file says of each, and the programs that it adds."""
    models = [_configured(entry, file.of(entry.id)) for entry in entries]
    return (*_sharing(models), *(_external(name, program) for name, program in file.external.items()))


def missing(file: ModelsFile, entries: Iterable[ModelEntry]) -> tuple[str, ...]:
    """Return the models that the file names and nobody has found, which is no error: they may come."""
    found = {entry.id for entry in entries}
    return tuple(name for name in file.models if name not in found)


def unheard(catalogue: Catalogue) -> Iterator[tuple[ModelEntry, str, ModelEntry]]:
    """Yield each alias by which its model cannot be asked for, since another one has it too: model, alias, other."""
    for entry in catalogue.entries:
        for alias in entry.aliases:
            other = catalogue.find(alias)
            if other is not None and other.id != entry.id:
                yield entry, alias, other


def why_unheard(alias: str, other: ModelEntry) -> str:
    """Return the line that tells of such an alias."""
    return f"its alias {alias!r} is a name of {other.id}, which is what is served under it: choose another alias"


def doubts(file: ModelsFile, catalogue: Catalogue) -> tuple[str, ...]:
    """Return a line for each thing that the file says in vain, as far as these models show."""
    strangers = (
        f"the models file has settings for {name!r}: there is no model of this id (planner list has those that are)"
        for name in missing(file, catalogue.entries)
    )
    return (*strangers, *(f"{one.id}: {why_unheard(alias, other)}" for one, alias, other in unheard(catalogue)))


def scheduling(entries: Iterable[ModelEntry]) -> dict[ModelId, core.ModelSettings]:
    """Return what the core has to know of each model for which anything is set."""
    found = {entry.id: _scheduling(entry) for entry in entries}
    return {model: settings for model, settings in found.items() if settings != core.AS_FOR_ALL}


def amendments(settings: ModelSettings) -> Amendments | None:
    """Return what these settings change in requests; None: nothing."""
    if not (settings.set or settings.force or settings.strip):
        return None
    return Amendments(settings.set, settings.force, settings.strip)


def _configured(entry: ModelEntry, settings: ModelSettings) -> ModelEntry:
    role = entry.role if settings.role is None else Role(settings.role)
    return replace(entry, role=role, aliases=settings.aliases, settings=settings)


def _sharing(entries: Iterable[ModelEntry]) -> Iterator[ModelEntry]:
    """Yield the models, those that are names of one another with the first of them: they share its runner."""
    first: dict[object, list[ModelEntry]] = {}
    for entry in entries:
        alike = first.setdefault((entry.loaded_files, entry.role), [])
        same = next((one for one in alike if _scheduling(one) == _scheduling(entry)), None)
        if same is None or entry.problem is not None:
            alike.append(entry)
            yield entry
        else:
            yield replace(entry, runs_as=same.id)


def _external(name: str, program: ExternalRunner) -> ModelEntry:
    return ModelEntry(
        ModelId(name), program.cmd[0], 0, 0.0, role=Role(program.role), aliases=program.aliases, external=program
    )


def _scheduling(entry: ModelEntry) -> core.ModelSettings:
    said = entry.settings if entry.external is None else entry.external
    return core.ModelSettings(
        keep_alive_s=said.keep_alive,
        pinned=bool(said.pin),
        priority=said.priority or 0,
        preload=bool(said.preload),
        launch=_launch(entry),
    )


def _launch(entry: ModelEntry) -> object:
    """Return what a runner is started with, as far as it is set: a change of it needs another runner."""
    if entry.external is not None:
        return replace(entry.external, keep_alive=None, pin=None, priority=None, preload=None, aliases=())
    unset = ModelSettings()
    launch = replace(
        entry.settings,
        keep_alive=None,
        pin=None,
        priority=None,
        preload=None,
        aliases=(),
        set=unset.set,
        force=unset.force,
        strip=(),
    )
    return None if launch == unset else launch
