"""What the service would serve, found without one: models of the folder and of the store, as the models file says."""

from __future__ import annotations

from functools import cache

from config.model_settings import ModelsFile
from config.settings import Loaded
from planner.errors import InvalidRequest
from planner.model import read_model
from supervisor.models import configured, places
from supervisor.models.catalogue import Catalogue
from supervisor.store.folder import StoreFolder


def served(loaded: Loaded, file: ModelsFile) -> Catalogue:
    """Return the models as the service would serve them. Raises InvalidRequest where their folder cannot be read.

    One that nobody named need not be there.
    """
    settings, optional = loaded.settings, loaded.is_default("models")
    store = StoreFolder(settings.store, settings.registry)
    try:
        found = places.scan(settings.models, store, cache(read_model), folder_optional=optional)
    except OSError as error:
        raise InvalidRequest(f"{settings.models} cannot be read ({error.strerror}): check PLANNER_MODELS") from None
    models = Catalogue()
    models.replace(configured.apply(file, found))
    return models
