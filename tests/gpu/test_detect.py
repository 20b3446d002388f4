"""The whole machine: cards, their names on llama-server's command line, memory, and what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import CUDA_LIST, NO_DEVICES, calls, write_server
from file_trees import write_tree
from test_nvml import A100_DIVIDED, RTX3060, RTX4090
from test_rocm import TWO_CARDS

from config.values import RpcServer
from gpu import show
from gpu.detect import detect
from planner.types import HOST, HOST_POOL, DeviceKind

MIB = 1024**2
GIB = 1024**3
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 33554432 kB\nBuffers: 0 kB\nCached: 0 kB"

CODE = """
import json, os
from pathlib import Path
from gpu import detect, show
found = detect.detect(os.environ, llama_server=Path(SERVER))
print(json.dumps(show.as_json(found.machine)))
"""


@pytest.fixture
def nvidia(python: Callable[..., str], nvml_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function from the stub's cards and a server's path to what ``planner devices --json`` would show."""

    def devices(cards: str, server: Path, **variables: str) -> dict[str, Any]:
        fixture = tmp_path / "nvml.txt"
        fixture.write_text(cards)
        stub = {"LD_LIBRARY_PATH": str(nvml_folder), "FAKE_NVML": str(fixture), "XDG_CACHE_HOME": str(tmp_path / "c")}
        code = CODE.replace("SERVER", repr(str(server)))
        result: dict[str, Any] = json.loads(python(code, **stub, **variables))
        return result

    return devices


def test_two_unequal_cards_carry_llama_servers_names_and_the_smaller_free_figure(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    found = nvidia(RTX4090 + RTX3060, server)
    first, second, host = found["devices"]
    assert (first["name"], first["uuid"]) == ("CUDA0", "GPU-bbbb")
    assert (second["name"], second["uuid"]) == ("CUDA1", "GPU-aaaa")
    assert first["free_bytes"] == 11000 * MIB, "llama-server saw less than NVML"
    assert second["free_bytes"] == 25757220864 - 393216000 - GIB, "NVML saw less than llama-server"
    assert second["bandwidth_bytes_per_s"] == pytest.approx(1008e9, rel=0.001)
    assert all(device["usable"] for device in found["devices"])
    assert (host["name"], host["kind"]) == ("Host", "host")
    assert found["warnings"] == []


def test_the_second_time_llama_server_is_not_started_and_its_old_figures_are_not_used(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    nvidia(RTX4090 + RTX3060, server)
    found = nvidia(RTX4090 + RTX3060, server)
    assert calls(tmp_path / "a") == ["--version", "--list-devices"]
    assert found["devices"][0]["free_bytes"] == 12884901888 - 134217728


def test_a_card_that_the_server_cannot_use_is_named_with_the_command_that_would_change_it(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    server = write_server(tmp_path / "a", NO_DEVICES)
    found = nvidia(RTX4090, server)
    card = found["devices"][0]
    assert not card["usable"]
    assert card["name"] == "CUDA0"
    assert card["why_not"] == f"{server} was built without CUDA: build one with make llama BACKEND=cuda"
    assert found["warnings"] == [f"CUDA0 (NVIDIA GeForce RTX 4090) is left idle: {card['why_not']}"]


def test_a_card_that_is_hidden_from_cuda_is_not_taken_for_the_one_that_is_shown(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    two_alike = RTX3060 + RTX3060.replace("GPU-bbbb 0 1 0", "GPU-cccc 0 2 0")
    only_one = "Available devices:\n  CUDA0: NVIDIA GeForce RTX 3060 (12000 MiB, 11000 MiB free)\n"
    server = write_server(tmp_path / "a", only_one, backends=("cpu", "cuda"))
    found = nvidia(two_alike, server, CUDA_VISIBLE_DEVICES="1")
    shown, hidden, _ = found["devices"]
    assert (shown["uuid"], shown["usable"]) == ("GPU-cccc", True)
    assert (hidden["uuid"], hidden["usable"]) == ("GPU-bbbb", False)
    assert "CUDA_VISIBLE_DEVICES" in hidden["why_not"]


def test_planner_devices_prints_the_promised_keys_and_nothing_else(
    python: Callable[..., str], nvml_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "nvml.txt").write_text(RTX4090)
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    shown = python(
        "import sys; from planner.cli import main; sys.exit(main(['devices', '--json']))",
        LD_LIBRARY_PATH=str(nvml_folder),
        FAKE_NVML=str(tmp_path / "nvml.txt"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        PLANNER_LLAMA_SERVER=str(server),
    )
    found = json.loads(shown)
    assert list(found) == ["devices", "warnings", "looked_for", "pools"]
    keys = "name kind description uuid pci_bus_id total_bytes free_bytes bandwidth_bytes_per_s pool usable why_not"
    more = "processes compute_capability endpoint alignment_bytes overhead_bytes card"
    assert all(list(device) == [*keys.split(), *more.split()] for device in found["devices"])
    assert [device["name"] for device in found["devices"]] == ["CUDA0", "CUDA1", "Host"]
    assert found["devices"][1]["uuid"] == "GPU-aaaa"
    assert found["devices"][1]["card"]["driver"] == "580.65.06"
    assert found["devices"][1]["card"]["reserved_bytes"] == 393216000
    assert found["devices"][0]["uuid"] is None, "NVML does not know this one"
    assert found["devices"][0]["card"] is None


def test_a_unified_part_is_counted_in_the_hosts_pool(nvidia: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    listing = "Available devices:\n  CUDA0: NVIDIA GB10 (124610 MiB, 120000 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "cuda"))
    card, host = nvidia("card NVIDIA_GB10 GPU-cccc f 1 0\ncapability 12 1\n", server)["devices"]
    assert card["pool"] == host["pool"] == "host"
    assert card["free_bytes"] == host["free_bytes"]


def test_of_a_divided_card_the_part_that_cuda_shows_is_used_and_the_other_says_how_to_choose_it(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    listing = "Available devices:\n  CUDA0: NVIDIA A100-SXM4-80GB MIG 3g.40gb (40320 MiB, 40000 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "cuda"))
    first, second, _ = nvidia(A100_DIVIDED, server)["devices"]
    assert (first["uuid"], first["usable"]) == ("MIG-1111", True)
    assert (second["uuid"], second["usable"]) == ("MIG-2222", False)
    assert "CUDA_VISIBLE_DEVICES=MIG-2222" in second["why_not"]
    assert first["pool"] != second["pool"], "each part has memory of its own"


def test_several_devices_on_one_card_share_its_pool_and_are_not_named_by_its_uuid(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    listing = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (12094 MiB, 11700 MiB free)
  CUDA1: NVIDIA GeForce RTX 4090 (12094 MiB, 11700 MiB free)
"""
    server = write_server(tmp_path / "a", listing, backends=("cpu", "cuda"))
    first, second, _ = nvidia(RTX4090, server, GGML_CUDA_DEVICES="2")["devices"]
    assert first["pool"] == second["pool"] == "0000:41:00.0"
    assert first["uuid"] is second["uuid"] is None
    assert first["free_bytes"] == (25757220864 - 393216000 - GIB) // 2, "NVML's figure, by halves"


def test_a_card_that_its_compute_mode_closes_is_listed_and_not_used(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    found = nvidia(RTX3060 + "compute_mode 2\n" + RTX4090, server)
    closed, other, _ = found["devices"]
    assert (closed["usable"], other["usable"]) == (False, True)
    assert "nvidia-smi -c DEFAULT" in closed["why_not"]
    assert found["warnings"] == [f"CUDA0 (NVIDIA GeForce RTX 3060) is left idle: {closed['why_not']}"]


def test_memory_that_changes_between_two_looks_is_seen(nvidia: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    cards = RTX3060 + RTX4090
    nvidia(cards, server)
    before = nvidia(cards, server)["devices"][0]["free_bytes"]
    after = nvidia(cards.replace("134217728 0", f"134217728 {GIB}"), server)["devices"][0]["free_bytes"]
    assert before - after == GIB


WATCHING = """
import json, os
from pathlib import Path
from gpu import detect, show
fixture, listing = Path(os.environ["FAKE_NVML"]), Path(SERVER).parent.parent / "listing"
looks, found = [], None
for cards, listed in STEPS:
    fixture.write_text(cards)
    listing.write_text(listed)
    found = detect.detect(os.environ, llama_server=Path(SERVER), previous=found)
    looks.append({device.name: device.uuid for device in found.machine.devices})
print(json.dumps(looks))
"""


def test_a_card_that_vanishes_between_two_looks_and_comes_back_is_followed(
    python: Callable[..., str], nvml_folder: Path, tmp_path: Path
) -> None:
    first, second = RTX3060, RTX3060.replace("GPU-bbbb 0 1 0", "GPU-cccc 0 2 0")
    line = "  CUDA{}: NVIDIA GeForce RTX 3060 (12160 MiB, 11000 MiB free)\n"
    both, one = (f"Available devices:\n{line.format(0)}{more}" for more in (line.format(1), ""))
    server = write_server(tmp_path / "a", both, backends=("cpu", "cuda"))
    steps = [(first + second, both), (first + "error 15\n" + second, one), (first + second, both)]
    code = WATCHING.replace("SERVER", repr(str(server))).replace("STEPS", repr(steps))
    shown = python(
        code,
        LD_LIBRARY_PATH=str(nvml_folder),
        FAKE_NVML=str(tmp_path / "nvml.txt"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert json.loads(shown) == [
        {"CUDA0": "GPU-bbbb", "CUDA1": "GPU-cccc"},
        {"CUDA0": "GPU-cccc"},
        {"CUDA0": "GPU-bbbb", "CUDA1": "GPU-cccc"},
    ]
    assert calls(tmp_path / "a").count("--list-devices") == 2, "each set of cards is asked about once"


BESIDE = """Available devices:
  Vulkan0: Intel(R) Arc(tm) A770 Graphics (16032 MiB, 15000 MiB free)
  Vulkan1: Intel(R) UHD Graphics 770 (ADL-S GT1) (48000 MiB, 47000 MiB free)
"""


def test_an_integrated_gpu_beside_a_discrete_one_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    server = write_server(tmp_path / "a", BESIDE, backends=("cpu", "vulkan"))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    discrete, integrated = detect(environ, llama_server=server).machine.devices
    assert (discrete.usable, integrated.usable) == (True, False)
    assert integrated.pool == HOST_POOL
    named = detect(environ, llama_server=server, named=["Vulkan1"]).machine.device("Vulkan1")
    assert named.usable


def test_an_integrated_gpu_alone_is_used_and_shares_the_hosts_memory(tmp_path: Path) -> None:
    server = write_server(tmp_path / "a", BESIDE.replace("  Vulkan0", "Vulkan0"), backends=("cpu", "vulkan"))
    machine = detect({"XDG_CACHE_HOME": str(tmp_path / "c"), "PATH": "/bin"}, llama_server=server).machine
    (integrated,) = machine.devices
    assert integrated.usable
    assert integrated.pool == machine.host.pool
    assert integrated.free_bytes is not None
    assert machine.host.free_bytes is not None
    assert integrated.free_bytes <= machine.host.free_bytes


@pytest.fixture
def amd_machine(tmp_path: Path) -> Path:
    """Return a root folder with two AMD cards, device files that may be opened, and 64 GiB of memory."""
    files: dict[str, str | int] = {"proc/meminfo": MEMINFO, "dev/kfd": "", "dev/dri/renderD128": ""}
    write_tree(tmp_path / "root", TWO_CARDS | files | {"dev/dri/renderD129": ""})
    return tmp_path / "root"


def test_amds_cards_are_matched_by_order_and_believed_before_hip(
    amd_machine: Path, rocm_path: Path, tmp_path: Path
) -> None:
    listing = """Available devices:
  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24560 MiB free)
  ROCm1: AMD Instinct MI210 (16368 MiB, 16368 MiB free)
"""
    server = write_server(tmp_path / "a", listing, backends=("cpu", "hip"))
    environ = {"ROCM_PATH": str(rocm_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    machine = detect(environ, llama_server=server, root=amd_machine).machine
    first, second = machine.devices
    assert (first.name, first.kind, first.pci_bus_id) == ("ROCm0", DeviceKind.ROCM, "0000:03:00.0")
    assert first.free_bytes == 23 * GIB, "HIP does not see what other programs hold"
    assert first.description == "AMD Radeon RX 7900 XTX"
    assert second.description == "AMD Instinct MI210"
    assert machine.host.free_bytes == 32 * GIB
    assert {pool.id for pool in machine.pools} == {HOST_POOL, first.pool, second.pool}


def test_weights_that_the_owners_runners_have_mapped_are_not_counted_as_available(
    amd_machine: Path, tmp_path: Path
) -> None:
    write_tree(
        amd_machine,
        {
            "proc/50/task/50/children": "61",
            "proc/61/comm": "llama-server",
            "proc/61/status": f"RssFile: {8 * 1024**2} kB",
        },
    )
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
    machine = detect(environ, llama_server=tmp_path / "none", owner=50, root=amd_machine).machine
    assert machine.host.free_bytes == 24 * GIB
    assert next(pool.free_bytes for pool in machine.pools if pool.id == HOST_POOL) == 24 * GIB


def test_amds_cards_without_a_server_for_them_are_named_by_pyrsmi(
    amd_machine: Path, rocm_path: Path, tmp_path: Path
) -> None:
    server = write_server(tmp_path / "a", NO_DEVICES)
    environ = {"ROCM_PATH": str(rocm_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    machine = detect(environ, llama_server=server, root=amd_machine).machine
    assert machine.devices[0].description == "AMD Radeon RX 7900 XTX"
    assert "BACKEND=hip" in str(machine.devices[0].why_not)
    assert len(machine.warnings) == 2


def test_a_device_that_only_the_server_knows_is_asked_about_each_time(tmp_path: Path) -> None:
    listing = "Available devices:\n  Vulkan0: Intel(R) Arc(tm) A770 Graphics (16032 MiB, 15000 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "vulkan"))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    detect(environ, llama_server=server)
    (tmp_path / "a/listing").write_text(listing.replace("15000", "9000"))
    (device,) = detect(environ, llama_server=server).machine.devices
    assert (device.name, device.kind) == ("Vulkan0", DeviceKind.VULKAN)
    assert device.free_bytes == 9000 * MIB


def test_a_later_look_does_not_take_the_first_ones_figures_for_new(tmp_path: Path) -> None:
    listing = "Available devices:\n  Vulkan0: Some card (16032 MiB, 1000 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "vulkan"))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    first = detect(environ, llama_server=server)
    (tmp_path / "a/listing").write_text(listing.replace(" 1000", " 9000"))
    (device,) = detect(environ, llama_server=server, previous=first).machine.devices
    assert device.free_bytes == 9000 * MIB


def test_a_part_of_a_card_has_no_more_than_llama_server_sees_of_it(
    nvidia: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    listing = "Available devices:\n  CUDA0: NVIDIA GeForce RTX 4090 MIG 1g.10gb (9728 MiB, 9700 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "cuda"))
    first = nvidia(RTX4090, server)["devices"][0]
    assert (first["total_bytes"], first["free_bytes"]) == (9728 * MIB, 9700 * MIB)
    second = nvidia(RTX4090, server)["devices"][0]
    assert (second["total_bytes"], second["free_bytes"]) == (9728 * MIB, 9728 * MIB)


def test_workers_come_before_the_cards_of_this_machine(rpc_workers: Callable[[int], Any], tmp_path: Path) -> None:
    (worker,) = rpc_workers(1)
    name, _, port = worker.endpoint.rpartition(":")
    listing = "Available devices:\n  Vulkan0: Some card (16032 MiB, 15000 MiB free)\n"
    server = write_server(tmp_path / "a", listing, backends=("cpu", "vulkan", "rpc"))
    environ = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    found = detect(environ, llama_server=server, rpc_servers=[RpcServer(name, int(port), GIB)])
    assert [device.name for device in found.machine.devices] == ["RPC0", "Vulkan0"]
    assert found.machine.device("RPC0").free_bytes == GIB
    again = detect(
        environ, rpc_servers=[RpcServer(name, int(port), GIB)], leased=frozenset({worker.endpoint}), previous=found
    )
    assert again.machine.device("RPC0") == found.machine.device("RPC0")
    assert again.llama.build == found.llama.build


def test_this_machine_is_detected_with_its_host_last(llama_tools: Path, tmp_path: Path) -> None:
    found = detect({"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert found.llama.build.path is not None
    shown = show.as_json(found.machine)
    assert shown["devices"][-1]["kind"] == "host"
    assert shown["devices"][-1]["name"] == HOST
    assert any("llama-server" in place for place in shown["looked_for"])
    json.dumps(shown, allow_nan=False)


def test_a_light_look_asks_nobody_where_a_card_sleeps_that_would_be_woken(
    amd_machine: Path, rocm_path: Path, tmp_path: Path
) -> None:
    line = "  ROCm{}: AMD Radeon RX 7900 XTX (16368 MiB, 16368 MiB free)\n"
    server = write_server(tmp_path / "a", f"Available devices:\n{line.format(0)}{line.format(1)}", backends=("hip",))
    environ = {"ROCM_PATH": str(rocm_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    before = detect(environ, llama_server=server, root=amd_machine)
    used = "sys/class/drm/renderD129/device/mem_info_vram_used"
    state = "sys/bus/pci/drivers/nvidia/0000:01:00.0/power/runtime_status"
    write_tree(amd_machine, {used: 10 * GIB, state: "suspended"})
    assert detect(environ, previous=before, lightly=True, root=amd_machine) is before
    write_tree(amd_machine, {state: "active"})
    after = detect(environ, previous=before, lightly=True, root=amd_machine)
    assert after.machine.device("ROCm1").free_bytes == 6 * GIB
    assert after.machine.device("ROCm0") == before.machine.device("ROCm0")
