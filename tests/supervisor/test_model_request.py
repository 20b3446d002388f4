"""What is asked of the planner for one model: its file, the operator's settings, a client's options, in that order."""

from __future__ import annotations

import pytest

from config.model_settings import ModelSettings
from planner.errors import InvalidRequest
from planner.types import LoadOptions, PlanRequest, Role
from supervisor.core.types import ModelId
from supervisor.models.catalogue import ModelEntry
from supervisor.planning.model_request import request_of

ENTRY = ModelEntry(ModelId("one"), "/models/one.gguf", 1, 0.0, mmproj="/models/mmproj-one.gguf")
FLAGS = ("-c", "8192", "-np", "2", "--swa-full", "--top-k", "20")


def test_without_settings_the_file_alone_says_what_is_asked() -> None:
    assert request_of(ENTRY, ModelSettings()) == PlanRequest(mmproj="/models/mmproj-one.gguf")


def test_settings_win_over_flags_and_a_clients_options_over_both() -> None:
    settings = ModelSettings(flags=FLAGS, slots=4)
    request = request_of(ENTRY, settings)
    assert (request.n_ctx, request.n_parallel, request.swa_full, request.passthrough) == (
        8192,
        4,
        True,
        ("--top-k", "20"),
    )
    asked = request_of(ENTRY, settings, LoadOptions(n_ctx=3072, n_gpu_layers=7, use_mmap=False))
    assert (asked.n_ctx, asked.n_ctx_per_slot, asked.n_gpu_layers, asked.load_mode) == (None, 3072, 7, "none")


def test_a_client_gets_no_context_without_room_for_an_image_from_a_model_that_sees() -> None:
    """What the operator set is as short as it was set, and so is what a client asks of a model without eyes."""
    short, blind = LoadOptions(n_ctx=512), ModelSettings(projector=False)
    assert request_of(ENTRY, ModelSettings(), short).n_ctx_per_slot == 2048
    assert request_of(ENTRY, blind, short).n_ctx_per_slot == 512
    assert request_of(ENTRY, ModelSettings(context=512)).n_ctx_per_slot == 512


@pytest.mark.parametrize("main_gpu", [0, 1])
def test_the_gpu_that_a_client_names_has_the_model_to_itself(main_gpu: int) -> None:
    """Whatever the operator's flags split it over."""
    asked = request_of(ENTRY, ModelSettings(flags=("-sm", "row", "-mg", "3")), LoadOptions(main_gpu=main_gpu))
    assert (asked.split_mode, asked.main_gpu) == ("none", main_gpu)


def test_a_projector_may_be_another_or_none() -> None:
    assert request_of(ENTRY, ModelSettings(projector="/other.gguf")).mmproj == "/other.gguf"
    assert request_of(ENTRY, ModelSettings(projector=False)).mmproj is None


def test_role_draft_and_prediction_layers_are_asked_for() -> None:
    request = request_of(ENTRY, ModelSettings(role="embedding", mtp=True), draft="/models/small.gguf")
    assert (request.role, request.model_draft, request.spec_type) == (Role.EMBEDDING, "/models/small.gguf", "draft-mtp")


@pytest.mark.parametrize(
    "flags,says",
    [
        (("--port", "1"), "--port"),
        (("--fit", "on"), "--fit"),
        (("--api-key", "x"), "--api-key"),
        (("--nonsense",), "--nonsense"),
        (("another.gguf",), "no model"),
        (("--no-gpu",), "only llama-server's own"),
        (("-hf", "a/b"), "downloaded"),
    ],
)
def test_flags_that_are_not_the_models_to_set_are_refused_by_name(flags: tuple[str, ...], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        request_of(ENTRY, ModelSettings(flags=flags))
