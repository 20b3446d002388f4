"""The models of a command line: files by their paths, and by their names those that the service would serve."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from planner.errors import InvalidRequest, ModelFileError
from planner.model import read_model
from planner.types.request import PlanRequest

if TYPE_CHECKING:
    from config.settings import Settings
    from planner.flags import CommandLine
    from planner.model import ModelFacts
    from supervisor.models.catalogue import Catalogue

_PATH_BEGINS: Final = ("/", ".", "~")
_PATH_ENDS: Final = ".gguf"


@dataclass(slots=True)
class Models:
    """Whatever the words of a command line stand for. Names are looked for when the first one comes."""

    line: CommandLine
    _served: tuple[Settings, Catalogue] | None = None

    def asked(self, word: str) -> tuple[ModelFacts, PlanRequest]:
        """Return the model of this path or name, and what is asked of it: of a name what the service would ask, too.

        Raises ModelFileError where it cannot be read or is not there, InvalidRequest for settings that are wrong.
        """
        if os.path.lexists(word) or word.startswith(_PATH_BEGINS) or word.endswith(_PATH_ENDS):
            model = read_model(word)
            return model, self.line.request_of(model.role)
        path, request = self._as_served(word)
        return read_model(path), _over(request, self.line.request_of(request.role))

    def _as_served(self, name: str) -> tuple[str, PlanRequest]:
        """Return where the model of this name lies, and what the service would ask the planner for."""
        from supervisor.planning.model_request import request_of

        settings, models = self._served = self._served or _look()
        entry = models.find(name)
        if entry is None:
            near = " or ".join(models.closest(name))
            where = f"{settings.models} (PLANNER_MODELS) or {settings.store} (PLANNER_STORE)"
            raise ModelFileError(
                name,
                f"there is no such file, and no model of that name in {where}",
                f"did you mean {near}?" if near else "check the path or the name",
            )
        if entry.external is not None:
            raise InvalidRequest(f"{name}: that is a program of the models file, so there is no model to plan for")
        if entry.problem is not None:
            raise ModelFileError(name, entry.problem)
        return entry.path, request_of(entry, entry.settings, draft=models.draft_of(entry.settings))


def _look() -> tuple[Settings, Catalogue]:
    """Return the settings and the models that there are: what the service reads, and files are planned without."""
    from config import models_file
    from config.resolve import ConfigError
    from config.settings import load
    from supervisor.models.served import served

    try:
        loaded = load(os.environ)
        return loaded.settings, served(loaded, models_file.read(loaded.settings.models_file))
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None


def _over(settled: PlanRequest, flags: PlanRequest) -> PlanRequest:
    """Return what was settled with every flag that is given in its place; flags that are handed on add up."""
    unset = PlanRequest()
    names = [field.name for field in fields(PlanRequest) if field.name != "passthrough"]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) != getattr(unset, name)}
    if flags.n_ctx is not None:
        settled = replace(settled, n_ctx_per_slot=None)
    return replace(settled, **given, passthrough=(*settled.passthrough, *flags.passthrough))
