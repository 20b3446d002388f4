"""The build of llama.cpp's tools, as far as it can be tested without building for five minutes."""

import fcntl
import io
import os
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import build_inputs
import build_llama
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "build_llama.py"

INPUTS = build_inputs.BuildInputs(
    requirement="llama-cpp-python==1.0",
    backend="cpu",
    cmake_arguments=("-DA=ON",),
    compilers=("/usr/bin/gcc: gcc 12",),
    devices=(),
    cpu_features=("x86_64", "avx2"),
    variables=(),
)


def script(path: Path, text: str) -> Path:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"requirement": "llama-cpp-python==1.1"},
        {"backend": "cuda"},
        {"cmake_arguments": ("-DA=OFF",)},
        {"compilers": ("/usr/bin/gcc: gcc 13",)},
        {"devices": ("8.9",)},
        {"cpu_features": ("x86_64",)},
        {"variables": (("CFLAGS", "-O2"),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_everything_that_shapes_the_wheel(change: dict[str, object]) -> None:
    assert replace(INPUTS, **change).key != INPUTS.key


def test_the_key_is_the_same_for_the_same_machine() -> None:
    assert build_inputs.gather_inputs("cpu", os.environ).key == build_inputs.gather_inputs("cpu", dict(os.environ)).key


def test_arguments_of_the_user_come_last_and_count() -> None:
    plain = build_inputs.gather_inputs("cpu", {"PATH": os.environ["PATH"]})
    portable = build_inputs.gather_inputs("cpu", {"PATH": os.environ["PATH"], "CMAKE_ARGS": "-DGGML_NATIVE=OFF"})
    assert portable.cmake_arguments == (*plain.cmake_arguments, "-DGGML_NATIVE=OFF")


def test_the_features_of_another_processor_make_another_key(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: sse avx\n\nprocessor\t: 1\nflags\t\t: sse avx\n")
    assert build_inputs.cpu_features(cpuinfo)[1:] == ("avx", "sse")
    assert build_inputs.cpu_features(tmp_path / "absent") == build_inputs.cpu_features(cpuinfo)[:1]


def test_a_missing_compiler_is_named_with_the_package_that_has_it() -> None:
    with pytest.raises(build_llama.BuildError, match=r"no C compiler found.*apt install build-essential"):
        build_inputs.gather_inputs("cpu", {"PATH": "/nonexistent"})


@pytest.mark.parametrize(
    "devices,toolchains,backend",
    [
        ([], ["cuda", "hip", "vulkan"], "cpu"),
        (["nvidiactl"], ["cuda", "vulkan"], "cuda"),
        (["kfd", "dri/renderD128"], ["hip", "vulkan"], "hip"),
        (["kfd", "dri/renderD128"], ["vulkan"], "vulkan"),
        (["dri/renderD128"], ["vulkan"], "vulkan"),
        (["nvidiactl"], [], "cpu"),
    ],
)
def test_the_backend_follows_the_gpus_and_the_toolchains(
    tmp_path: Path, devices: list[str], toolchains: list[str], backend: str
) -> None:
    for device in devices:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    found, _ = build_inputs.detect_backend(tmp_path, lambda name: "/usr/bin/x" if name in toolchains else None)
    assert found == backend


def test_a_gpu_that_no_toolchain_serves_is_named_with_the_package_to_install(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    _, (warning,) = build_inputs.detect_backend(tmp_path, lambda _: None)
    assert "NVIDIA GPU" in warning
    assert "apt install nvidia-cuda-toolkit" in warning
    assert warning.endswith("make llama BACKEND=cuda")


def test_a_second_process_waits_for_the_lock_and_says_so(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    program = (
        f"import pathlib, build_llama\nwith build_llama.locked(pathlib.Path({str(lock)!r}), 'another one builds'):\n"
        "    print('entered')"
    )
    with lock.open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=SCRIPT.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == "another one builds, waiting for it\n"
        assert waiting.poll() is None
    output, _ = waiting.communicate(timeout=10)
    assert output == "entered\n"


def test_a_wheel_in_the_cache_is_used_without_building(tmp_path: Path) -> None:
    wheel = tmp_path / INPUTS.key / "llama_cpp_python-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert build_llama.cached_wheel(tmp_path, INPUTS, {"PATH": "/nonexistent"}) == wheel


def test_a_failed_build_leaves_its_log_and_nothing_in_the_cache(tmp_path: Path) -> None:
    impossible = replace(INPUTS, requirement=f"{tmp_path}/absent.tar.gz")
    with pytest.raises(build_llama.BuildError, match=r"(?s)build failed:.*absent\.tar\.gz.*The full log is"):
        build_llama.cached_wheel(tmp_path / "cache", impossible, os.environ)
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left == [f"{impossible.key}.lock", f"{impossible.key}.log"]


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    impossible = replace(INPUTS, requirement=f"{tmp_path}/absent.tar.gz")
    (tmp_path / f"{impossible.key}.tmp-dead" / "result").mkdir(parents=True)
    with pytest.raises(build_llama.BuildError):
        build_llama.cached_wheel(tmp_path, impossible, os.environ)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_an_interrupted_build_takes_its_compilers_along(tmp_path: Path) -> None:
    """The grandchild holds the pipe's other end: its end of file says that it is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with suppress(KeyboardInterrupt), build_llama.child(["sh", "-c", f"sleep 1000 >{pipe} & wait"], os.environ):
        grandchild = pipe.open()
        raise KeyboardInterrupt
    with grandchild:
        assert grandchild.read() == ""


def test_progress_without_a_terminal_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    output = [f"  [{done}/274] /usr/bin/g++ -c x.cpp\n" for done in range(1, 275)]
    log = io.StringIO()
    build_llama.follow(output, log)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].strip() for line in shown] == [
        f"compiling:{percent:4d}" for percent in range(10, 101, 10)
    ]
    assert log.getvalue() == "".join(output)


def test_the_tools_run_in_an_empty_environment(llama_tools: Path) -> None:
    assert build_llama.checked_version(llama_tools / "llama-server").startswith("version: ")


def test_a_server_that_leans_on_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    server = script(tmp_path / "llama-server", '[ -n "$LD_LIBRARY_PATH" ] && echo "version: 1" || exit 127')
    with pytest.raises(build_llama.BuildError, match=r"llama-server --version failed with status 127"):
        build_llama.checked_version(server)


def test_a_server_of_another_machine_is_refused_with_the_systems_words(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"\x7fELF not really")
    server.chmod(0o755)
    with pytest.raises(build_llama.BuildError, match="does not run"):
        build_llama.checked_version(server)


def test_outside_of_a_virtual_environment_nothing_is_touched() -> None:
    """The base interpreter of this environment plays the user who forgot to activate one."""
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    result = subprocess.run([base, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "virtual environment" in result.stderr
