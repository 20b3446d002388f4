"""The models of both places where they lie: those of the folder, and those of the store whose ids it leaves free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from planner.model import ModelFacts
from supervisor.models import catalogue
from supervisor.models.catalogue import ModelEntry
from supervisor.store import listing
from supervisor.store.folder import StoreFolder


def scan(
    folder: Path, store: StoreFolder | None, read: Callable[[str], ModelFacts], *, folder_optional: bool
) -> tuple[ModelEntry, ...]:
    """Return the models of the folder by id, then the store's; ``read`` gives a file's facts and raises PlannerError.

    Raises OSError where the folder cannot be read; one that is not there counts as empty where it is optional.
    """
    stored = () if store is None else listing.scan(store, read)
    try:
        found = catalogue.scan(folder, read)
    except FileNotFoundError:
        if not folder_optional:
            raise
        found = ()
    taken = {entry.id for entry in found}
    return (*found, *(entry for entry in stored if entry.id not in taken))
