"""What ``planner doctor`` finds: on snapshots made by hand, and as a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import CUDA_LIST, NO_DEVICES, write_server
from test_nvml import RTX3060, RTX4090

from gpu import doctor
from gpu.card import Card, Fault, Link, Probe, Vendor
from gpu.control_groups import ThreadLimit
from gpu.doctor import Finding, examine, is_healthy
from gpu.facts import Facts, Holder, PciGpu, Service
from gpu.host import HostMemory
from gpu.rpc import Worker, WorkerDevice, WorkerState
from planner.types import HOST_POOL, Device, DeviceKind, DeviceName, LlamaBuild, Machine, PoolId

MIB = 1024**2
GIB = 1024**3

CARD = Card(Vendor.NVIDIA, "NVIDIA GeForce RTX 4090", "0000:01:00.0", "GPU-1", 24 * GIB, 23 * GIB)
OTHER = replace(CARD, name="NVIDIA GeForce RTX 3060", pci_bus_id="0000:02:00.0", uuid="GPU-2")
CLOSED = Fault("its compute mode is prohibited", "sudo nvidia-smi -c DEFAULT")
NOT_OURS = Fault("this process may not open /dev/kfd", "add its user to render")
AMD_CARD = Card(Vendor.AMD, "AMD gfx1100", "0000:03:00.0", None, 24 * GIB, 23 * GIB)
DEVICE = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 24 * GIB, 23 * GIB, PoolId("p"), "NVIDIA GeForce RTX 4090")
WORKER = Device(DeviceName("RPC0"), DeviceKind.RPC, 64 * GIB, 64 * GIB, PoolId("w"), endpoint="10.0.0.2:50052")
BUSY = Worker("h:1", WorkerState.BUSY, why_not=Fault("it does not answer", "end its other client"))
MEMORY = HostMemory(64 * GIB, 48 * GIB)
HOST = MEMORY.device()
BUILD = LlamaBuild("/bin/llama-server", "0.5.0", "0c1e570", frozenset({"cpu", "cuda", "rpc"}))
ABSENT = Probe(installed=False)
HEALTHY = Facts(
    machine=Machine((DEVICE,), HOST),
    build=BUILD,
    nvidia=Probe((CARD,)),
    amd=ABSENT,
    cards={"CUDA0": CARD},
    memory=MEMORY,
    pci=(PciGpu("NVIDIA", "0000:01:00.0", "nvidia"),),
    nodes=frozenset({"nvidiactl", "nvidia-uvm"}),
    services=(Service("this process", None, 65536),),
)


def with_device(**changes: Any) -> Machine:
    """Return the machine with its one device changed."""
    return Machine((replace(DEVICE, **changes),), HOST)


def with_holder(**changes: Any) -> tuple[Holder, ...]:
    """Return one process that holds most of the card."""
    return (replace(Holder("CUDA0", 77, "llama-server", 20 * GIB), **changes),)


def test_on_a_healthy_machine_nothing_is_found() -> None:
    assert examine(HEALTHY) == ()


def test_a_machine_without_any_gpu_is_healthy() -> None:
    bare = Facts(Machine((), HOST), replace(BUILD, backends=frozenset({"cpu"})), nvidia=ABSENT, amd=ABSENT)
    assert examine(bare) == ()


def test_a_variable_for_nvidias_cards_that_hides_none_of_amds_is_healthy() -> None:
    """HIP reads it too, and finds its own first card there."""
    both = replace(HEALTHY, amd=Probe((AMD_CARD,)), environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert examine(both) == ()


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no driver": ({"nvidia": ABSENT}, "no NVIDIA driver for the card 0000:01:00.0", "install"),
    "nouveau": (
        {"nvidia": ABSENT, "pci": (PciGpu("NVIDIA", "0000:01:00.0", "nouveau"),)},
        "belongs to the driver nouveau",
        "NVIDIA's own driver",
    ),
    "container without its flags": ({"nvidia": ABSENT, "in_container": True}, "this container", "--gpus all"),
    "driver upgraded": (
        {"nvidia": Probe(faults=(Fault("NVIDIA: the driver was upgraded", "reboot"),)), "cards": {}},
        "the driver was upgraded",
        "reboot",
    ),
    "too few threads for a runner": (
        {"services": (Service("this process", None, 65536, threads=ThreadLimit(26, "control group /a")),)},
        "leaves this process 26 more threads",
        "--pids-limit",
    ),
    "driver that knows no card": ({"nvidia": Probe()}, "the driver does not know the card", "kernel log"),
    "no device node for CUDA": ({"nodes": frozenset({"nvidiactl"})}, "/dev/nvidia-uvm is missing", "nvidia-modprobe"),
    "no device node in a container": ({"nodes": frozenset(), "in_container": True}, "/dev/nvidia-uvm", "--gpus all"),
    "AMD without KFD": (
        {"pci": (PciGpu("AMD", "0000:03:00.0", None),)},
        "the kernel offers no compute on it",
        "modprobe amdgpu",
    ),
    "AMD in a container": (
        {"pci": (PciGpu("AMD", "0000:03:00.0", None),), "in_container": True},
        "0000:03:00.0",
        "--device /dev/kfd",
    ),
    "AMD without permission": (
        {"amd": Probe((replace(AMD_CARD, why_not=NOT_OURS),))},
        "may not open /dev/kfd",
        "add its user to render",
    ),
    "compute mode": (
        {"cards": {"CUDA0": replace(CARD, why_not=CLOSED)}},
        "compute mode is prohibited",
        "nvidia-smi -c DEFAULT",
    ),
    "no llama-server": (
        {"build": replace(BUILD, path=None), "tried": ("embedded /x (not there)",)},
        "no llama-server found; looked for: embedded /x",
        "make llama",
    ),
    "llama-server without the backend": (
        {"left_idle": {"CUDA0": Fault("/bin/l was built without CUDA", "build one with make llama")}},
        "CUDA0 (NVIDIA GeForce RTX 4090) is left idle: /bin/l was built without CUDA",
        "make llama",
    ),
    "llama-server without RPC": (
        {"build": replace(BUILD, backends=frozenset({"cuda"})), "workers": (Worker("h:1", WorkerState.READY),)},
        "was built without RPC",
        "make llama",
    ),
    "an entry that names no card": (
        {"environ": {"CUDA_VISIBLE_DEVICES": "0,7"}},
        "7 names no card",
        "nvidia-smi -L",
    ),
    "numbers without an order": (
        {"nvidia": Probe((CARD, OTHER)), "environ": {"CUDA_VISIBLE_DEVICES": "1,0"}},
        "counts in PCI order here",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID",
    ),
    "HIP reads CUDA's variable": (
        {"amd": Probe((AMD_CARD,)), "environ": {"CUDA_VISIBLE_DEVICES": "GPU-1"}},
        "read by HIP too",
        "HIP_VISIBLE_DEVICES",
    ),
    "container told to hide cards": ({"environ": {"NVIDIA_VISIBLE_DEVICES": "void"}}, "void keeps", "--gpus all"),
    "left behind": ({"holders": with_holder()}, "process 77 (llama-server) holds 20.0 GiB", "kill 77"),
    "left behind by the service's earlier life": (
        {"holders": with_holder(unit="planner.service"), "unit": "planner.service"},
        "whoever started it is gone",
        "kill 77",
    ),
    "worker unreachable": (
        {"workers": (Worker("h:1", WorkerState.UNREACHABLE, why_not=Fault("refused", "start ggml-rpc-server")),)},
        "RPC worker h:1 is unreachable: refused",
        "start ggml-rpc-server",
    ),
    "worker busy": ({"workers": (BUSY,)}, "RPC worker h:1 is busy", "end its other client"),
    "worker incompatible": (
        {"workers": (Worker("h:1", WorkerState.INCOMPATIBLE, why_not=Fault("protocol 1.0.0", "run the same build")),)},
        "RPC worker h:1 is incompatible: protocol 1.0.0",
        "run the same build",
    ),
    "a control group that leaves nothing": (
        {"memory": HostMemory(GIB, GIB, limited_by="control group /a")},
        "the control group /a leaves 1.0 GiB",
        "MemoryMax=",
    ),
    "the service's own limit": (
        {"services": (*HEALTHY.services, Service("planner serve (process 9)", None, 65536, HostMemory(GIB, GIB, "b")))},
        "planner serve (process 9): the b leaves",
        "MemoryMax=",
    ),
    "no memory": ({"memory": HostMemory(64 * GIB, GIB)}, "only 1.0 GiB of host memory", "end what holds it"),
    "too few files for the service": (
        {"services": (*HEALTHY.services, Service("planner serve (process 9)", None, 1024))},
        "planner serve (process 9) may open 1024 files",
        "LimitNOFILE=",
    ),
    "NVIDIA's module hidden": ({"pynvml_shadow": "/x/pynvml/__init__.py"}, "/x/pynvml/__init__.py", "pip uninstall"),
}
NOTES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a display": ({"cards": {"CUDA0": replace(CARD, drives_display=True)}}, "drives a display", "GPU_OVERHEAD=CUDA0="),
    "few lanes": ({"cards": {"CUDA0": replace(CARD, link=Link(4, 4, 16))}}, "by 4 of its 16 PCIe lanes", "slot"),
    "memory not told": ({"cards": {"CUDA0": replace(CARD, free_bytes=None)}}, "does not tell", "nvidia-smi"),
    "cards hidden on purpose": (
        {"nvidia": Probe((CARD, OTHER)), "environ": {"CUDA_VISIBLE_DEVICES": "GPU-1"}},
        "hides 1 of 2 cards",
        "unset",
    ),
    "another order": ({"environ": {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}}, "FASTEST_FIRST", "PCI_BUS_ID"),
    "an odd variable": ({"environ": {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}}, "another card", "unset"),
    "the shim": ({"pynvml_shim": "/x.py"}, "deprecated pynvml", "pip uninstall pynvml"),
    "an integrated GPU left out": (
        {
            "machine": with_device(usable=False, pool=HOST_POOL),
            "left_idle": {"CUDA0": Fault("it shares the host's memory", "name it")},
        },
        "is left idle",
        "name it",
    ),
    "a server that does not run": (
        {"failed": ("PATH /l (--version ended with status -4: no output)",)},
        "status -4",
        "make llama",
    ),
    "somebody's own server": (
        {"holders": with_holder(parent="/usr/bin/bash")},
        "started by /usr/bin/bash",
        "stop that",
    ),
    "another service's server": ({"holders": with_holder(unit="ollama.service")}, "by ollama.service", "stop that"),
    "another program": ({"holders": with_holder(name="python3")}, "process 77 (python3)", "make room"),
    "a process of another namespace": ({"holders": with_holder(name=None)}, "not to be seen", "from the host"),
    "a limit that leaves enough": (
        {"memory": HostMemory(16 * GIB, 12 * GIB, limited_by="control group /a")},
        "leaves 12.0 GiB",
        "MemoryHigh=",
    ),
    "little locked memory": ({"services": (Service("this process", 8 * MIB, 65536),)}, "8.0 MiB", "LimitMEMLOCK="),
    "a worker that the service may use": (
        {
            "workers": (BUSY,),
            "services": (*HEALTHY.services, Service("planner serve (process 9)", None, 65536)),
        },
        "RPC worker h:1 is busy",
        "end its other client",
    ),
    "few threads": (
        {"services": (Service("this process", None, 65536, threads=ThreadLimit(60, "control group /a")),)},
        "the control group /a leaves this process 60 more threads; a model takes about 27",
        "TasksMax=infinity",
    ),
    "few files for a shell": ({"services": (Service("this process", None, 1024),)}, "1024 files", "LimitNOFILE="),
    "a worker without a cap": (
        {
            "machine": Machine((WORKER,), HOST),
            "workers": (Worker("10.0.0.2:50052", WorkerState.READY, "7.0.0", (WorkerDevice(64 * GIB, 64 * GIB, 32),)),),
        },
        "calls all RAM there free",
        "PLANNER_RPC_SERVERS=10.0.0.2:50052=SIZE",
    ),
}


def _only(changes: dict[str, Any]) -> Finding:
    (finding,) = examine(replace(HEALTHY, **changes))
    return finding


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_with_what_mends_it(name: str) -> None:
    changes, what, fix = WRONG[name]
    finding = _only(changes)
    assert finding.wrong
    assert what in finding.what
    assert fix in finding.fix


@pytest.mark.parametrize("name", NOTES)
def test_what_is_worth_knowing_is_a_note(name: str) -> None:
    changes, what, fix = NOTES[name]
    finding = _only(changes)
    assert not finding.wrong
    assert what in finding.what
    assert fix in finding.fix


@pytest.mark.parametrize("changes", [changes for changes, _, _ in (*WRONG.values(), *NOTES.values())])
def test_every_finding_is_one_line_with_a_fix(changes: dict[str, Any]) -> None:
    for finding in examine(replace(HEALTHY, **changes)):
        assert finding.fix
        assert "\n" not in finding.what + finding.fix


def test_under_wsl_and_on_a_unified_part_other_device_nodes_are_enough() -> None:
    assert examine(replace(HEALTHY, nodes=frozenset({"dxg"}))) == ()
    assert examine(replace(HEALTHY, nodes=frozenset(), nvidia=Probe((replace(CARD, unified=True),)))) == ()


def test_a_runner_of_the_service_is_no_finding() -> None:
    parent = "/opt/loadmaster/.venv/bin/python /opt/loadmaster/.venv/bin/planner serve"
    assert examine(replace(HEALTHY, holders=with_holder(parent=parent))) == ()


@pytest.mark.parametrize("used, total", [(None, 24 * GIB), (20, None)])
def test_of_a_program_nobody_says_that_it_holds_much_where_that_is_not_known(
    used: int | None, total: int | None
) -> None:
    holders = with_holder(name="python3", used_bytes=used)
    assert examine(replace(HEALTHY, machine=with_device(total_bytes=total), holders=holders)) == ()


def test_the_text_has_a_line_for_every_check_and_a_verdict() -> None:
    text = doctor.as_text(examine(replace(HEALTHY, memory=HostMemory(GIB, GIB, limited_by="control group /a"))))
    assert "ok     NVIDIA driver" in text
    assert re.search(r"^WRONG  host memory: .*\n       -> raise MemoryMax=", text, re.MULTILINE)
    assert text.endswith("1 thing is wrong.")


@pytest.fixture
def planner_doctor(nvml_folder: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command over the stub of NVIDIA's library."""

    def run(cards: str, server: Path, *words: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "nvml.txt").write_text(cards)
        environ = {
            "PATH": "/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(nvml_folder),
            "FAKE_NVML": str(tmp_path / "nvml.txt"),
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PLANNER_LLAMA_SERVER": str(server),
        }
        command = [sys.executable, "-m", "planner", "doctor", *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    return run


def test_the_command_ends_with_1_where_something_is_wrong_and_says_it_as_json(
    planner_doctor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = planner_doctor(RTX4090, write_server(tmp_path / "a", NO_DEVICES), "--json")
    assert (done.returncode, done.stderr) == (1, "")
    answer = json.loads(done.stdout)
    assert list(answer) == ["schema", "healthy", "findings", "checked"]
    assert not answer["healthy"]
    wrong = [finding for finding in answer["findings"] if finding["severity"] == "wrong"]
    assert any("built without CUDA" in finding["what"] for finding in wrong)
    assert any("BACKEND=cuda" in finding["fix"] for finding in wrong)


def test_the_command_names_a_lost_card_beside_a_good_one(
    planner_doctor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = planner_doctor(RTX4090 + "error 15\n" + RTX3060, write_server(tmp_path / "a", CUDA_LIST))
    assert done.returncode == 1
    assert "fallen off the bus" in done.stdout
    assert done.stderr == ""


def test_without_anything_wrong_the_command_ends_with_0(llama_tools: Path, free_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "planner", "doctor", "--json"]
    done = subprocess.run(command, env=free_environment, capture_output=True, text=True, timeout=60, check=False)
    answer = json.loads(done.stdout)
    assert (done.returncode == 0) == answer["healthy"]
    assert answer["checked"][0] == "NVIDIA driver"
    assert is_healthy(()) is True
