"""What is loaded beside a model: charged to the byte where it lies, refused where llama.cpp would not load it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import companion_models
import pytest
from drafting_model import write_drafting_model
from live_server import MIB, assert_as_planned, device_words, explain, lines_until_ready, places_of, reserved
from machines import machine_of
from published_models import dimensions, write_model

from planner import companions
from planner.build import PINNED_BUILD
from planner.companions import projector
from planner.errors import InvalidRequest, ModelFileError
from planner.model import Attachment, read_attachment, read_model
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Figure,
    Machine,
    NoFit,
    PlacementKind,
    Plan,
    PlanRequest,
    Policy,
    PoolId,
    Refused,
    Source,
)

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
HOST_ALONE = Machine((), Device(HOST, DeviceKind.HOST, 64 << 30, 64 << 30, HOST_POOL))


@pytest.fixture(scope="module")
def adapters(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two adapters of the model: a small one, and a large one that changes embedding and output too."""
    folder = tmp_path_factory.mktemp("adapters")
    small, large = folder / "small.gguf", folder / "large.gguf"
    companion_models.write_lora(small, endless_model, rank=12)
    companion_models.write_lora(large, endless_model, rank=70, extra=(EMBEDDING, OUTPUT))
    return small, large


def outcome(model: Path, **knobs: Any) -> Any:
    """Return the answer to this request on a host without devices."""
    request = PlanRequest(**knobs)
    facts = companions.attach(read_model(str(model)), request)
    return search(facts, request, HOST_ALONE, Policy(), PINNED_BUILD)


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-ngl", "3", "-lm", "none"),
        ("-nkvo", "-fa", "off"),
        ("-ncffn", "4"),
        ("--lora-init-without-apply", "-fa", "on"),
    ],
    ids=" ".join,
)
def test_adapters_take_what_the_plan_says(
    flags: tuple[str, ...],
    endless_model: Path,
    adapters: tuple[Path, Path],
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Two adapters lie where the matrices lie that they change, and widen the graphs that they are part of."""
    workers = rpc_workers(2)
    words = device_words(workers)
    files = ",".join(map(str, adapters))
    fixed = ("-c", "4096", "-ts", "3,2", "--lora", files, "--no-oracle")
    plan = explain(str(endless_model), *words, *fixed, *flags, environment=free_environment)

    # The log has one line for the model and one for each adapter, each rounded.
    assert_as_planned(plan, places_of(workers), free_environment, resolution=0.01)
    assert {source for device in plan["devices"] for source in device["source"].values()} == {"exact", "simulated"}


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags", [("--reranking",), ("--pooling", "rank"), ("--reranking", "-fa", "off")], ids=" ".join
)
def test_an_adapter_of_a_reranker_takes_what_the_plan_says(
    flags: tuple[str, ...],
    rerank_model: Path,
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Its classifier is read without adapters, whatever they hold."""
    companion_models.write_lora(tmp_path / "adapter.gguf", rerank_model, rank=30)
    workers = rpc_workers(2)
    fixed = ("-c", "1024", "--lora", str(tmp_path / "adapter.gguf"), "--no-oracle")
    plan = explain(str(rerank_model), *device_words(workers), *fixed, *flags, environment=free_environment)
    assert_as_planned(plan, places_of(workers), free_environment, resolution=0.01)


def test_a_scaled_adapter_takes_what_any_other_takes(endless_model: Path, adapters: tuple[Path, Path]) -> None:
    plain = outcome(endless_model, n_ctx=512, lora=tuple(map(str, adapters)))
    small, large = adapters
    scaled = outcome(endless_model, n_ctx=512, passthrough=("--lora-scaled", f"{small}:0.5,{large}:2"))
    assert scaled.usages == plain.usages != outcome(endless_model, n_ctx=512).usages
    assert "--lora-scaled" in scaled.launch.argv


def test_an_adapter_of_an_embedding_that_is_the_output_too_is_told(tmp_path: Path) -> None:
    """Seen with a really loading server: it aborts over a product whose shapes do not go together."""
    model = write_model(tmp_path / "tied.gguf", dimensions("small")["small-gemma2"])
    companion_models.write_lora(tmp_path / "adapter.gguf", model, extra=(EMBEDDING,))
    plan = outcome(model, n_ctx=512, lora=(str(tmp_path / "adapter.gguf"),))
    assert any("the embedding, which is the output too" in warning for warning in plan.warnings)


def test_an_adapter_of_another_architecture_is_refused(endless_model: Path, tmp_path: Path) -> None:
    companion_models.write_lora(tmp_path / "other.gguf", endless_model, architecture="qwen3")
    refused = outcome(endless_model, lora=(str(tmp_path / "other.gguf"),))
    assert isinstance(refused, Refused)
    assert "is an adapter for qwen3, the model is llama" in refused.reason


def test_an_adapter_of_another_size_is_refused(endless_model: Path, chat_model: Path, tmp_path: Path) -> None:
    companion_models.write_lora(tmp_path / "other.gguf", chat_model)
    refused = outcome(endless_model, lora=(str(tmp_path / "other.gguf"),))
    assert isinstance(refused, Refused)
    assert "blk.0.attn_k.weight has another shape" in refused.reason


def test_a_model_is_no_adapter(endless_model: Path) -> None:
    refused = outcome(endless_model, lora=(str(endless_model),))
    assert isinstance(refused, Refused)
    assert "is no LoRA adapter" in refused.reason


def test_an_adapter_that_is_missing_is_named(endless_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing\.gguf: there is no such file"):
        outcome(endless_model, lora=(str(tmp_path / "missing.gguf"),))


# ---------------------------------------------------------------------------------------------------------------------
# Projectors

ADDED = re.compile(r"\[mtmd\] adding ([0-9.]+) MiB to fit_params_target for device (RPC0|CPU)")
RESERVED = re.compile(r"reserve_compute_meta:\s+(RPC0|CPU)\S*\s+compute buffer size =\s+([0-9.]+) MiB")


@pytest.mark.llama
@pytest.mark.parametrize("kind", ["gemma3", "qwen2vl_merger", "qwen2.5vl_merger", "pixtral"])
def test_a_projector_takes_its_weights_to_the_byte_and_no_more_buffers_than_said(
    kind: str,
    endless_model: Path,
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    llama_tools: Path,
    free_environment: dict[str, str],
) -> None:
    """llama.cpp names a projector's weights and buffers as one sum per device, and the buffers alone."""
    companion_models.write_projector(tmp_path / "mmproj.gguf", kind=kind)
    worker = rpc_workers(1)[0]
    files = ("-m", str(endless_model), "--mmproj", str(tmp_path / "mmproj.gguf"))
    command = [str(llama_tools / "llama-server"), "--rpc", worker.endpoint, *files, "-c", "512", "-lv", "5"]
    added, buffers = {}, {}
    for line in lines_until_ready([*command, "--port", "0"], free_environment):
        if found := ADDED.search(line):
            added[found[2]] = float(found[1])
        if found := RESERVED.search(line):
            buffers[found[1]] = float(found[2])

    device = Device(DeviceName("RPC0"), DeviceKind.RPC, 1 << 30, 1 << 30, PoolId("worker"))
    charge = projector.charge(read_attachment(str(tmp_path / "mmproj.gguf")), device, PINNED_BUILD)
    on_device, on_host = charge.devices["RPC0"], charge.devices[HOST]
    assert on_device.model.source is Source.EXACT
    assert mib(on_device.model) == pytest.approx(added["RPC0"] - buffers["RPC0"], abs=0.02)
    assert mib(on_host.model) == pytest.approx(added["CPU"] - buffers["CPU"], abs=0.02)
    for figure, measured in ((on_device.compute, buffers["RPC0"]), (on_host.compute, buffers["CPU"])):
        assert figure.source is Source.ESTIMATED
        assert measured <= mib(figure) <= 1.25 * measured + 0.5


def mib(figure: Figure) -> float:
    assert figure.bytes is not None
    return figure.bytes / MIB


def test_a_projector_lies_on_the_first_device_or_where_the_flag_says(endless_model: Path, tmp_path: Path) -> None:
    companion_models.write_projector(tmp_path / "mmproj.gguf")
    machine = machine_of(DeviceKind.RPC, 2)
    plans, allocated, told = {}, {}, []
    for offload in (None, True, False):
        mmproj = str(tmp_path / "mmproj.gguf") if offload is not None else None
        request = PlanRequest(n_ctx=4096, tensor_split=(1, 1), mmproj=mmproj, mmproj_offload=offload)
        facts = companions.attach(read_model(str(endless_model)), request)
        plan = search(facts, request, machine, Policy(), PINNED_BUILD)
        assert isinstance(plan, Plan)
        told += [decision.chosen for decision in plan.decisions if decision.step == "projector"]
        plans[offload] = [usage.planned_bytes or 0 for usage in plan.usages]
        allocated[offload] = plan.host.allocated_bytes or 0
    assert ["on RPC0" in where for where in told] == [True, False], "the reader learns where it lies"
    on_device, on_host = (
        [new - old for new, old in zip(plans[key], plans[None], strict=True)] for key in (True, False)
    )
    assert on_device[0] > MIB > on_device[2] > on_device[1] == 0
    assert on_host[2] > MIB > on_host[0] == on_host[1] == 0
    assert allocated[False] - MIB > allocated[True] == allocated[None], "there it is read into memory, not mapped"


def test_a_model_is_no_projector(endless_model: Path) -> None:
    refused = outcome(endless_model, mmproj=str(endless_model))
    assert isinstance(refused, Refused)
    assert "is no projector" in refused.reason


def test_a_projector_of_unknown_making_leaves_its_buffers_open(endless_model: Path, tmp_path: Path) -> None:
    companion_models.write_projector(tmp_path / "mmproj.gguf", kind="gemma3nv")
    device = machine_of(DeviceKind.CUDA, 1).devices[0]
    charge = projector.charge(read_attachment(str(tmp_path / "mmproj.gguf")), device, PINNED_BUILD)
    assert charge.devices["CUDA0"].model.source is Source.ESTIMATED
    assert charge.devices["CUDA0"].compute.source is Source.UNKNOWN
    assert "gemma3nv" in charge.not_built[0]


@pytest.mark.parametrize(
    "kind, metadata, tokens",
    [
        ("gemma3", {}, 0),
        ("qwen2vl_merger", {}, 4096),
        ("exaone4_5", {"image_max_pixels": 3000 * 28**2}, 3000),
        ("exaone4_5", {"image_max_pixels": 2**31 - 1}, 4096),
        ("exaone4_5", {"image_max_pixels": 9, "patch_size": 0}, 0),
        ("of tomorrow", {"image_max_pixels": 9}, 0),
    ],
)
def test_what_a_large_image_takes_of_the_context_is_told_by_kind_or_file(
    kind: str, metadata: dict[str, int], tokens: int
) -> None:
    said = {f"clip.vision.{name}": value for name, value in ({"patch_size": 14} | metadata).items()}
    encoder = Attachment("mmproj.gguf", {"clip.projector_type": kind, **said}, ())
    assert projector.image_tokens(encoder) == tokens


@pytest.mark.parametrize("kind, shortest, told", [("gemma3", 4096, []), ("qwen2vl_merger", 6144, ["6,144 tokens"])])
def test_a_context_that_is_chosen_has_room_for_a_large_image_and_words(
    endless_model: Path, tmp_path: Path, kind: str, shortest: int, told: list[str]
) -> None:
    """Also where that leaves layers to the CPU; what is pinned is as short as it was pinned."""
    companion_models.write_projector(tmp_path / "mmproj.gguf", kind=kind)
    request = PlanRequest(mmproj=str(tmp_path / "mmproj.gguf"), n_ubatch=64)
    facts = companions.attach(read_model(str(endless_model)), request)
    (device,) = machine_of(DeviceKind.RPC, 1).devices

    def planned(request: PlanRequest, free_bytes: int) -> Plan:
        machine = replace(machine_of(DeviceKind.RPC, 1), devices=(replace(device, free_bytes=free_bytes),))
        plan = search(facts, request, machine, Policy(), PINNED_BUILD)
        assert isinstance(plan, Plan)
        return plan

    room = planned(replace(request, n_ctx=shortest, n_gpu_layers="all"), 1 << 30).usages[0].claimed_bytes
    whole, parted = planned(request, room), planned(request, room - MIB)
    assert (whole.placement.kind, parted.placement.kind) == (PlacementKind.GPU, PlacementKind.GPU_AND_CPU)
    assert whole.n_ctx_per_slot == shortest <= (parted.n_ctx_per_slot or 0)
    assert [each.chosen for each in whole.decisions if each.step == "shortest context"] == told
    assert planned(replace(request, n_ctx=1024), room).n_ctx_per_slot == 1024


def seeing_on(free_bytes: int, endless_model: Path, tmp_path: Path, **knobs: Any) -> Plan:
    """Return the plan for a model with eyes on one device of that size."""
    companion_models.write_projector(tmp_path / "mmproj.gguf", kind="qwen2vl_merger")
    request = PlanRequest(mmproj=str(tmp_path / "mmproj.gguf"), **knobs)
    facts = companions.attach(read_model(str(endless_model)), request)
    (device,) = machine_of(DeviceKind.RPC, 1).devices
    machine = replace(machine_of(DeviceKind.RPC, 1), devices=(replace(device, free_bytes=free_bytes),))
    plan = search(facts, request, machine, Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    return plan


def test_a_projector_that_leaves_no_layer_any_room_goes_to_the_host(endless_model: Path, tmp_path: Path) -> None:
    """It stays where one layer has room beside it, and where it is pinned there."""
    told = {}
    for mib in (1, 25, 100):
        plan = seeing_on(mib * MIB, endless_model, tmp_path, n_ctx=4096)
        chosen = {each.step: each for each in plan.decisions}["projector on the GPU"]
        told[mib] = bool(plan.placement.devices), chosen.chosen, "--no-mmproj-offload" in plan.launch.argv
    assert told == {1: (False, "yes", False), 25: (True, "no", True), 100: (True, "yes", False)}
    assert seeing_on(25 * MIB, endless_model, tmp_path, n_ctx=4096, mmproj_offload=True).placement.devices == ()


def test_a_projector_goes_to_the_host_before_a_model_is_refused(endless_model: Path, tmp_path: Path) -> None:
    plan = seeing_on(45 * MIB, endless_model, tmp_path, n_ctx=4096, n_gpu_layers="all")
    assert (plan.request.mmproj_offload, plan.decisions[-1].step) == (False, "projector on the GPU")
    assert plan.request.n_ubatch == 512, "that was enough"


# ---------------------------------------------------------------------------------------------------------------------
# Draft models

SPECULATES = ("--spec-type", "draft-simple")


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags",
    [
        ("-np", "2", "--spec-draft-n-max", "8", "-ts", "2,3,0"),
        ("-devd", "RPC2,RPC1", "-ngld", "2"),
        ("-ctkd", "f32", "-ctvd", "bf16", "-otd", r"blk\.1\.ffn_up=CPU"),
        ("-devd", "none", "-nkvo"),
    ],
    ids=" ".join,
)
def test_a_draft_model_takes_what_the_plan_says(
    flags: tuple[str, ...],
    endless_model: Path,
    chat_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """The draft is a whole second model, by its own flags, on the first one's devices or on others."""
    workers = rpc_workers(3)
    words = device_words(workers)
    fixed = ("-c", "4096", "-md", str(chat_model), *SPECULATES, "--no-oracle")
    plan = explain(str(endless_model), *words, *fixed, *flags, environment=free_environment)
    assert_as_planned(plan, places_of(workers), free_environment, resolution=0.01)
    assert {source for device in plan["devices"] for source in device["source"].values()} == {"exact", "simulated"}


@pytest.mark.llama
@pytest.mark.parametrize(
    "flags",
    [("-cmoed",), ("-ncmoed", "1"), ("-ts", "1,1", "-otd", r"blk\.0\.ffn_up_exps=RPC1", "-cmoed")],
    ids=" ".join,
)
def test_experts_of_a_draft_lie_on_the_cpu_as_the_flags_say(
    flags: tuple[str, ...],
    tmp_path: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Those of its own, whatever the model's do; an override before them wins."""
    model = str(write_model(tmp_path / "moe.gguf", dimensions("small")["small-qwen3moe"]))
    workers = rpc_workers(2)
    fixed = ("-c", "1024", "-md", model, *SPECULATES, "--no-oracle", "-ncmoe", "2")
    plan = explain(model, *device_words(workers), *fixed, *flags, environment=free_environment)
    assert not any("not in these figures" in warning for warning in plan["warnings"])
    assert_as_planned(plan, places_of(workers), free_environment, resolution=0.02)


def test_a_draft_that_fits_nowhere_is_no_fit(endless_model: Path, chat_model: Path) -> None:
    card = Device(DeviceName("RPC0"), DeviceKind.RPC, 64 << 20, 64 << 20, PoolId("large"))
    small = Device(DeviceName("RPC1"), DeviceKind.RPC, 1 << 20, 1 << 20, PoolId("small"))
    machine = Machine((card, small), HOST_ALONE.host)
    request = PlanRequest(n_ctx=4096, model_draft=str(chat_model), devices_draft=("RPC1",), spec_type="draft-simple")
    answer = search(
        companions.attach(read_model(str(endless_model)), request), request, machine, Policy(), PINNED_BUILD
    )
    assert isinstance(answer, NoFit)
    assert [cause.device for cause in answer.causes] == ["RPC1"]


@pytest.mark.parametrize(
    "knobs, told",
    [
        ({"n_gpu_layers": 0}, True),
        ({"n_gpu_layers": 0, "n_gpu_layers_draft": 99}, True),
        ({"n_gpu_layers": 0, "n_gpu_layers_draft": 0}, False),
        ({"n_gpu_layers": 0, "devices_draft": ("RPC0",)}, False),
        ({"n_gpu_layers": 1}, False),
        ({"devices": ()}, False),
    ],
)
def test_a_draft_that_has_no_device_because_the_model_has_none_is_told(
    endless_model: Path, chat_model: Path, knobs: dict[str, Any], *, told: bool
) -> None:
    request = PlanRequest(n_ctx=1024, model_draft=str(chat_model), spec_type="draft-simple", **knobs)
    facts = companions.attach(read_model(str(endless_model)), request)
    plan = search(facts, request, machine_of(DeviceKind.RPC, 1), Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    assert any("--device-draft" in warning for warning in plan.warnings) is told


def test_a_draft_that_nobody_uses_is_told(endless_model: Path, chat_model: Path) -> None:
    plan = outcome(endless_model, n_ctx=4096, model_draft=str(chat_model))
    assert any("--spec-type" in warning for warning in plan.warnings)


def test_a_draft_that_llama_cpp_would_not_load_is_refused(endless_model: Path, chat_model: Path) -> None:
    refused = outcome(endless_model, model_draft=str(chat_model), cache_type_v_draft="q4_0", flash_attn="off")
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(f"the draft model {chat_model}: a quantized V cache")


# ---------------------------------------------------------------------------------------------------------------------
# Overridden metadata


@pytest.mark.llama
def test_overridden_metadata_count_for_model_and_draft(
    endless_model: Path, chat_model: Path, free_environment: dict[str, str]
) -> None:
    """A trained length that is overridden is the context; a value of another type is ignored, as llama.cpp does."""
    overrides = "llama.context_length=int:2000,llama.block_count=float:3"
    fixed = ("--no-gpu", "--override-kv", overrides, "-md", str(chat_model), *SPECULATES, "--no-oracle")
    plan = explain(str(endless_model), *fixed, environment=free_environment)
    assert plan["context_per_slot"] == 2000
    assert plan["model"]["n_layers"] == 8
    assert_as_planned(plan, {"Host": "Host"}, free_environment, resolution=0.01)


@pytest.mark.parametrize("word", ["llama.block_count", "a=int:x", "a=bool:yes", "a=long:1", f"a=str:{'x' * 128}"])
def test_an_override_that_llama_cpp_cannot_read_is_wrong_usage(word: str, endless_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="--override-kv"):
        outcome(endless_model, override_kv=(word,))


# ---------------------------------------------------------------------------------------------------------------------
# Draft heads


@pytest.fixture(scope="module")
def drafting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drafting") / "drafting.gguf"
    write_drafting_model(path)
    return path


@pytest.mark.llama
@pytest.mark.parametrize("flags", [("-ts", "3,2"), ("-np", "2", "--spec-draft-n-max", "7", "-ub", "64"), ("-ngl", "2")])
def test_a_draft_head_takes_the_weights_and_caches_that_the_plan_says(
    flags: tuple[str, ...],
    drafting_model: Path,
    rpc_workers: Callable[[int], tuple[Any, ...]],
    free_environment: dict[str, str],
) -> None:
    """Its layers are loaded, it has a cache of its own, and each recurrent state is kept in several ages."""
    workers = rpc_workers(2)
    words = device_words(workers)
    fixed = ("-c", "2048", "--spec-type", "draft-mtp", "--no-oracle")
    plan = explain(str(drafting_model), *words, *fixed, *flags, environment=free_environment)
    measured, places = reserved(plan, free_environment), places_of(workers)

    for device in plan["devices"]:
        for kind in ("model_bytes", "context_bytes"):
            printed = measured.get((places[device["name"]], kind), 0.0)
            assert device[kind] / MIB == pytest.approx(printed, abs=0.02), (device["name"], kind)
        buffers = measured.get((places[device["name"]], "compute_bytes"), 0.0)
        assert device["compute_bytes"] / MIB >= buffers - 0.01, device["name"]
        assert device["source"]["compute"] == "estimated" or buffers == 0


def test_a_model_without_a_draft_head_is_refused_one(endless_model: Path) -> None:
    refused = outcome(endless_model, spec_type="draft-mtp")
    assert isinstance(refused, Refused)
    assert "no layers that draft" in refused.reason
