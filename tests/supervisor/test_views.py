"""What the snapshot tells of a model that is not loaded."""

from __future__ import annotations

import pytest

from supervisor.core.pool import Pool
from supervisor.core.types import Limits, ModelId
from supervisor.models.catalogue import ModelEntry
from supervisor.views import ModelViews


@pytest.mark.parametrize(
    "promised, trained, told",
    [(8192, 512, 512), (8192, 131072, 8192), (8192, None, 8192), (None, 512, None)],
    ids=["trained for less", "trained for more", "not known", "nothing was promised"],
)
def test_an_unloaded_model_tells_the_context_that_a_conversation_will_get(
    promised: int | None, trained: int | None, told: int | None
) -> None:
    entry = ModelEntry(id=ModelId("m"), path="/m.gguf", file_bytes=1, modified_at=0.0, n_ctx_train=trained)
    pool = Pool(Limits(max_loaded_models=None, max_queue=1, keep_alive_s=60.0, load_timeout_s=1.0, drain_timeout_s=1.0))
    view = ModelViews(promised).of(entry, pool)
    assert view.n_ctx_per_slot == told
