"""A plan's launch says everything explicitly, and shows a runner only the devices that it is to use."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from requests_strategy import plan_requests

from planner import launch
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    LlamaBuild,
    Machine,
    PlanRequest,
    PoolId,
)

MIB = 1024 * 1024
BUILD = LlamaBuild("/bin/llama-server", "0", "0c1e570", frozenset({"cuda", "rpc"}))
NOT_FOUND = LlamaBuild(None, None, None)


def device(name: str, kind: DeviceKind, *, uuid: str | None = None, endpoint: str | None = None) -> Device:
    return Device(DeviceName(name), kind, None, None, PoolId(name), uuid=uuid, endpoint=endpoint)


def machine(*devices: Device, what_if: bool = False) -> Machine:
    host = Device(HOST, DeviceKind.HOST, None, None, HOST_POOL)
    return Machine(devices, host, what_if=what_if)


CARDS = machine(*(device(f"CUDA{i}", DeviceKind.CUDA, uuid=f"GPU-{i}") for i in range(3)))
WORKERS = machine(
    device("RPC0", DeviceKind.RPC, endpoint="a:1"),
    device("RPC1", DeviceKind.RPC, endpoint="a:1"),
    device("RPC2", DeviceKind.RPC, endpoint="b:2"),
    device("RPC3", DeviceKind.RPC, endpoint="b:2"),
)


@given(plan_requests())
def test_a_launch_is_read_back_as_the_request(request: PlanRequest) -> None:
    """Everything that a request says is on the command line, and nothing else."""
    request = replace(request, devices=(), devices_draft=None, rpc=None)
    assert launch.read(launch.spec("m.gguf", request, machine(), BUILD).argv) == request


def test_fit_is_off_and_the_log_speaks_of_memory() -> None:
    argv = launch.spec("m.gguf", PlanRequest(), machine(), NOT_FOUND).argv
    assert argv == ("llama-server", "-m", "m.gguf", "--fit", "off", "--device", "none", "-lv", "4")


def test_a_runner_sees_only_its_cards_and_counts_them_from_zero() -> None:
    """CUDA1 and CUDA2 of the plan are CUDA0 and CUDA1 to a process that sees only these two."""
    request = PlanRequest(devices=("CUDA1", "CUDA2"), override_tensor=(("exps", "CUDA2"), ("ffn", "CPU")))
    spec = launch.spec("m.gguf", request, CARDS, BUILD)
    assert dict(spec.env) == {
        "GGML_NO_BACKTRACE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2",
    }
    assert launch.read(spec.argv).devices == ("CUDA0", "CUDA1")
    assert launch.read(spec.argv).override_tensor == (("exps", "CUDA1"), ("ffn", "CPU"))


def test_the_order_of_the_plan_is_the_order_in_the_runner() -> None:
    spec = launch.spec("m.gguf", PlanRequest(devices=("CUDA2", "CUDA0")), CARDS, BUILD)
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "GPU-2,GPU-0"
    assert launch.read(spec.argv).devices == ("CUDA0", "CUDA1")


def test_a_runner_on_the_host_sees_no_card() -> None:
    spec = launch.spec("m.gguf", PlanRequest(devices=()), CARDS, BUILD)
    assert spec.env["CUDA_VISIBLE_DEVICES"] == ""
    assert launch.read(spec.argv).devices == ()


def test_amd_cards_are_chosen_by_unique_id_and_then_counted() -> None:
    mixed = machine(
        device("CUDA0", DeviceKind.CUDA, uuid="GPU-n"),
        device("ROCm0", DeviceKind.ROCM, uuid="GPU-a"),
        device("ROCm1", DeviceKind.ROCM, uuid="GPU-b"),
    )
    spec = launch.spec("m.gguf", PlanRequest(devices=("ROCm1",)), mixed, BUILD)
    assert spec.env["ROCR_VISIBLE_DEVICES"] == "GPU-b"
    assert spec.env["HIP_VISIBLE_DEVICES"] == "0"
    assert spec.env["CUDA_VISIBLE_DEVICES"] == ""
    assert launch.read(spec.argv).devices == ("ROCm0",)
    both = launch.spec("m.gguf", PlanRequest(devices=("ROCm1", "ROCm0")), mixed, BUILD)
    assert (both.env["ROCR_VISIBLE_DEVICES"], both.env["HIP_VISIBLE_DEVICES"]) == ("GPU-b,GPU-a", "0,1")


@pytest.mark.parametrize("chosen", [("ROCm0",), ("CUDA0", "ROCm0")])
def test_an_amd_card_without_a_unique_id_is_not_hidden_by_the_variable_for_nvidias(chosen: tuple[str, ...]) -> None:
    both = machine(device("CUDA0", DeviceKind.CUDA, uuid="GPU-1"), device("ROCm0", DeviceKind.ROCM))
    spec = launch.spec("m.gguf", PlanRequest(devices=chosen), both, BUILD)
    assert "CUDA_VISIBLE_DEVICES" not in spec.env, "HIP would read it"
    assert spec.argv[spec.argv.index("--device") + 1] == ",".join(chosen)


def test_only_the_workers_that_are_used_are_connected() -> None:
    """Names count over the workers that are named, buffer types within their own worker."""
    request = PlanRequest(devices=("RPC3",), override_tensor=(("exps", "RPC3"),))
    read = launch.read(launch.spec("m.gguf", request, WORKERS, BUILD).argv)
    assert read.rpc == ("b:2",)
    assert read.devices == ("RPC1",)
    assert read.override_tensor == (("exps", "RPC1[b:2]"),)


def test_workers_come_before_the_devices_that_they_make() -> None:
    argv = launch.spec("m.gguf", PlanRequest(devices=("RPC0", "RPC2")), WORKERS, BUILD).argv
    assert argv.index("--rpc") < argv.index("--device")
    assert launch.read(argv).rpc == ("a:1", "b:2")
    assert launch.read(argv).devices == ("RPC0", "RPC2")


def test_an_imagined_worker_without_address_is_left_out_of_the_line() -> None:
    imagined = machine(device("RPC0", DeviceKind.RPC), what_if=True)
    spec = launch.spec("m.gguf", PlanRequest(devices=("RPC0",)), imagined, BUILD)
    assert "--rpc" not in spec.argv
    assert launch.unaddressed(imagined.devices) == ("RPC0",)


@pytest.mark.parametrize("margins, text", [((0, 512 * MIB + 1), "0,513"), ((-5,), "0")])
def test_llama_cpps_own_fit_gets_our_margins_in_mib_rounded_up(margins: tuple[int, ...], text: str) -> None:
    argv = launch.spec("m.gguf", PlanRequest(devices=("CUDA0",)), CARDS, BUILD, fit_margins=margins).argv
    assert argv[argv.index("--fit") + 1] == "on"
    assert argv[argv.index("-fitt") + 1] == text
