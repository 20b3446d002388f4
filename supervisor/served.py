"""What the service would serve, found without one: models of the folder and of the store, as the models file says."""

from __future__ import annotations

from functools import cache

from config.model_settings import ModelsFile
from config.settings import Settings
from planner.errors import InvalidRequest
from planner.model import read_model
from supervisor import catalogue, configured
from supervisor.catalogue import Catalogue
from supervisor.store import listing
from supervisor.store.folder import StoreFolder


def served(settings: Settings, file: ModelsFile) -> Catalogue:
    """Return the models as the service would serve them. Raises InvalidRequest where their folder cannot be read."""
    read = cache(read_model)
    store = listing.scan(StoreFolder(settings.store, settings.registry), read)
    try:
        found = catalogue.scan(settings.models, read)
    except FileNotFoundError:
        found = ()
    except OSError as error:
        raise InvalidRequest(f"{settings.models} cannot be read ({error.strerror}): check PLANNER_MODELS") from None
    taken = {entry.id for entry in found}
    both = (*found, *(entry for entry in store if entry.id not in taken))
    models = Catalogue()
    models.replace(configured.apply(file, both))
    return models
