"""Which llama-server is found, what it says of itself, and how often it has to be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_server import CUDA_LIST, NO_DEVICES, calls, write_server
from rpc_worker import RpcWorker

from gpu import llama
from planner.build import PINNED_COMMIT
from planner.types import DeviceKind

MIB = 1024**2


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a cache of its own and nothing on PATH."""
    return {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}


def test_the_embedded_server_is_found_and_says_what_it_is(llama_tools: Path, environ: dict[str, str]) -> None:
    search = llama.find(environ, configured=None, n_gpus=0)
    build = search.build
    assert build.path == str(llama_tools / "llama-server")
    assert build.commit == PINNED_COMMIT
    assert build.backends >= {"cpu", "rpc"}
    assert build.rpc_protocol == "7.0.0"
    assert build.library_path is not None
    assert Path(build.library_path).name == "libllama.so"
    assert search.not_found() is None


def test_finding_the_embedded_server_does_not_import_its_package(environ: dict[str, str]) -> None:
    code = (
        "import os, sys; from gpu import llama; llama.find(os.environ, configured=None, n_gpus=0);"
        "sys.exit('llama_cpp' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | environ, check=True)


def test_a_server_is_asked_once_and_then_remembered(tmp_path: Path, environ: dict[str, str]) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST, backends=("cpu", "cuda"))
    first = llama.ask(server, environ)
    second = llama.ask(server, environ)
    assert isinstance(first, llama.Server)
    assert isinstance(second, llama.Server)
    assert calls(tmp_path / "a") == ["--version", "--list-devices"]
    assert first.build == second.build
    assert [device.free_bytes for device in first.listed] == [11000 * MIB, 23600 * MIB]
    assert [device.free_bytes for device in second.listed] == [None, None], "an old figure is no figure"
    assert [device.total_bytes for device in second.listed] == [12160 * MIB, 24189 * MIB]


@pytest.mark.parametrize("change", ["environment", "machine", "binary", "library"])
def test_a_server_is_asked_again_when_what_its_answer_depends_on_has_changed(
    tmp_path: Path, environ: dict[str, str], change: str
) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST)
    llama.ask(server, environ, machine_key=("card 1",))
    if change == "environment":
        environ = environ | {"CUDA_VISIBLE_DEVICES": "1"}
    if change == "binary":
        server.write_text(server.read_text() + "# rebuilt\n")
    if change == "library":
        (tmp_path / "a/lib/libggml-cuda.so").touch()
    llama.ask(server, environ, machine_key=("card 2" if change == "machine" else "card 1",))
    assert calls(tmp_path / "a") == ["--version", "--list-devices"] * 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    server = write_server(tmp_path / "a", CUDA_LIST)
    assert isinstance(llama.ask(server, environ), llama.Server)
    assert isinstance(llama.ask(server, environ), llama.Server)
    assert len(calls(tmp_path / "a")) == 4


def test_a_server_is_asked_without_settings_that_would_change_its_answer(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    server = write_server(tmp_path / "a", CUDA_LIST)
    llama.ask(server, environ | {"LLAMA_ARG_DEVICE": "none", "LLAMA_API_KEY": "k", "CUDA_VISIBLE_DEVICES": "0,1"})
    seen = (tmp_path / "a/env").read_text()
    assert "LLAMA_ARG_DEVICE" not in seen
    assert "LLAMA_API_KEY" not in seen
    assert "CUDA_VISIBLE_DEVICES=0,1" in seen
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in seen


def test_the_configured_server_is_the_only_one_tried(tmp_path: Path, environ: dict[str, str]) -> None:
    search = llama.find(environ, configured=tmp_path / "nothing", n_gpus=0)
    assert search.server is None
    assert search.tried == (f"PLANNER_LLAMA_SERVER {tmp_path}/nothing (not there)",)
    error = search.not_found()
    assert error is not None
    assert "make llama" in error
    assert search.build.path is None
    assert search.build.commit == PINNED_COMMIT, "plans are then made for the pinned build"


def test_the_first_server_that_can_use_the_gpus_wins_over_one_before_it(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    server = write_server(tmp_path / "home/llama.cpp/build", CUDA_LIST, backends=("cpu", "cuda"))
    search = llama.find(environ, configured=None, n_gpus=2, root=tmp_path)
    assert search.build.path == str(server)
    assert search.build.backends >= {"cuda"}


def test_without_gpus_the_first_server_wins(llama_tools: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    write_server(tmp_path / "home/llama.cpp/build", CUDA_LIST)
    search = llama.find(environ, configured=None, n_gpus=0, root=tmp_path)
    assert search.build.path == str(llama_tools / "llama-server")


def test_a_server_that_fails_is_passed_over_with_its_last_line(tmp_path: Path, environ: dict[str, str]) -> None:
    server = write_server(tmp_path / "a", NO_DEVICES, status=127)
    answer = llama.ask(server, environ)
    assert isinstance(answer, str)
    assert "status 127" in answer
    assert "0c1e570" in answer


def test_a_server_that_hangs_is_passed_over_when_its_time_is_over(tmp_path: Path, environ: dict[str, str]) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    server.chmod(0o755)
    assert llama.ask(server, environ, timeout_s=0.1) == "--version gave no answer within 0.1 s"


def test_a_file_that_is_no_program_is_passed_over(tmp_path: Path, environ: dict[str, str]) -> None:
    file = tmp_path / "llama-server"
    file.write_text("text")
    assert llama.ask(file, environ) == "cannot be started: Permission denied"


@pytest.mark.parametrize("backend", ["CUDA", "ROCm"])
def test_a_binary_without_libraries_beside_it_is_searched_for_what_is_built_in(
    tmp_path: Path, environ: dict[str, str], backend: str
) -> None:
    server = tmp_path / "llama-server"
    marks = f"# %s: found %d {backend} devices ggml_backend_rpc_add_server"
    server.write_text(f"#!/bin/sh\necho 'version: 4567 (abcdef12)'\n{marks}\n")
    server.chmod(0o755)
    answer = llama.ask(server, environ)
    assert isinstance(answer, llama.Server)
    assert answer.build.backends == {"cpu", backend.lower(), "rpc"}
    assert (answer.build.version, answer.build.commit) == ("4567", "abcdef12")
    assert answer.build.rpc_protocol is None, "only the pinned build's protocol is known"


def test_accelerators_without_memory_and_workers_are_no_devices_of_this_machine() -> None:
    text = """Available devices:
  RPC0: 10.0.0.2:50052 (24080 MiB, 23600 MiB free)
  BLAS: OpenBLAS (0 MiB, 0 MiB free)
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24000 MiB free)
"""
    (device,) = llama.parse_list(text)
    assert (device.name, device.kind) == ("Vulkan0", DeviceKind.VULKAN)
    assert device.description == "AMD Radeon RX 7900 XTX (RADV NAVI31)"


def test_the_real_server_lists_its_workers_in_the_form_that_is_parsed(
    llama_tools: Path, rpc_workers: Callable[[int], tuple[RpcWorker, ...]]
) -> None:
    workers = rpc_workers(2)
    endpoints = ",".join(worker.endpoint for worker in workers)
    command = [str(llama_tools / "llama-server"), "--rpc", endpoints, "--list-devices"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert llama.parse_list(listing.replace("RPC", "CUDA")), "the form of a line has changed"


def test_cpu_features_are_the_kernels_words_for_them(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor : 0\nflags : fpu avx2 avx512f amx_int8 smep fma\n\nprocessor : 1\n"
    )
    assert llama.cpu_features(tmp_path) == {"avx2", "avx512f", "amx_int8", "fma"}


def test_a_service_without_a_home_keeps_nothing_and_writes_nowhere(tmp_path: Path) -> None:
    server = write_server(tmp_path / "a", NO_DEVICES)
    for home in ({}, {"HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        llama.ask(server, {"PATH": "/usr/bin:/bin", **home})
    assert calls(tmp_path / "a") == ["--version", "--list-devices"] * 3
