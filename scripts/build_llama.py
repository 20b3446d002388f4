"""Builds llama.cpp's tools out of llama-cpp-python's source package and installs them into this virtual environment.

pip keeps one wheel per version, whatever it was built with: it would hand back a build without tools, or one that dies
on another processor. So the wheel lies in a cache of our own, in a folder named by everything that shaped it. Nothing
but the standard library is imported: this runs before anything else is installed.

    python scripts/build_llama.py [--backend cpu|cuda|hip|vulkan] [--keep]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

CMAKE_ARGUMENTS = (
    "-DLLAVA_BUILD=OFF",  # its mtmd target collides with the one that llama.cpp's own tools bring
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_TOOLS_INSTALL=ON",
    "-DGGML_RPC=ON",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # on by default, and downloads web pages during the build
    "-DLLAMA_OPENSSL=OFF",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib",  # else the tools find their libraries only with LD_LIBRARY_PATH set
)
BACKEND_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "hip": ("-DGGML_HIP=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
}
# The compiler of each backend, where its packages put it outside of PATH, and what to install where it is missing.
TOOLCHAINS: Mapping[str, tuple[str, str, str]] = {
    "cuda": ("nvcc", "/usr/local/cuda/bin", "the CUDA toolkit (Debian, Ubuntu: apt install nvidia-cuda-toolkit)"),
    "hip": ("hipcc", "/opt/rocm/bin", "ROCm's compiler and BLAS (Debian, Ubuntu: apt install hipcc libhipblas-dev)"),
    "vulkan": ("glslc", "/usr/bin", "Vulkan's (Debian, Ubuntu: apt install glslc libvulkan-dev spirv-headers)"),
}
# How to ask for the architectures that a native build is made for: another card needs another build.
DEVICE_QUERIES: Mapping[str, tuple[str, ...]] = {
    "cuda": ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"),
    "hip": ("rocm_agent_enumerator",),
}
SHAPING_VARIABLES = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "HIPFLAGS")

SERVER = "llama-server"
PROBE_TIMEOUT_S = 60.0  # a compiler's or tool's --version; a cold ROCm takes seconds
PROGRESS_STEP_PERCENT = 10  # of lines where the output is no terminal
SHOWN_LOG_LINES = 15


class BuildError(Exception):
    """One line (or a few) that says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# What shapes a build


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """Everything that shapes the wheel."""

    requirement: str
    backend: str
    cmake_arguments: tuple[str, ...]
    compilers: tuple[str, ...]
    devices: tuple[str, ...]
    cpu_features: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """Return the name of the folder in the cache: equal for equal inputs only."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def gather_inputs(backend: str, environment: Mapping[str, str]) -> BuildInputs:
    """Return what a build of this backend on this machine would be made from. Raises BuildError without a compiler."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        (requirement,) = tomllib.load(file)["project"]["optional-dependencies"]["llama"]
    compilers = [
        compiler_identity(find_compiler("C", "CC", ("cc", "gcc", "clang"), environment)),
        compiler_identity(find_compiler("C++", "CXX", ("c++", "g++", "clang++"), environment)),
    ]
    if backend in TOOLCHAINS:
        compilers.append(compiler_identity(require_toolchain(backend)))
    return BuildInputs(
        requirement=requirement,
        backend=backend,
        cmake_arguments=(
            *CMAKE_ARGUMENTS,
            *BACKEND_ARGUMENTS[backend],
            *environment.get("CMAKE_ARGS", "").split(),
        ),
        compilers=tuple(compilers),
        devices=tuple(sorted(set(probe(DEVICE_QUERIES[backend]).split()))) if backend in DEVICE_QUERIES else (),
        cpu_features=cpu_features(),
        variables=tuple((name, environment[name]) for name in SHAPING_VARIABLES if name in environment),
    )


def find_compiler(language: str, variable: str, names: tuple[str, ...], environment: Mapping[str, str]) -> str:
    """Return the compiler's path: the variable's where it is set, else the first name found. Raises BuildError."""
    wanted = (environment[variable],) if environment.get(variable) else names
    for name in wanted:
        if path := shutil.which(name, path=environment.get("PATH")):
            return path
    raise BuildError(
        f"no {language} compiler found (looked for {', '.join(wanted)}): "
        f"install one (Debian, Ubuntu: apt install build-essential) or set {variable}"
    )


def compiler_identity(path: str) -> str:
    """Return the compiler's real path and its version."""
    return f"{Path(path).resolve()}: {' / '.join(probe((path, '--version')).splitlines()[:5])}"


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return the processor's features as Linux names them, which decide what a native build may use."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return (platform.machine(),)
    features = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return (platform.machine(), *(sorted(features[1].split()) if features else ()))


def probe(command: tuple[str, ...]) -> str:
    """Return what the command prints, or nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Which backend


def find_toolchain(backend: str) -> str | None:
    """Return the path of the backend's compiler."""
    compiler, usual_folder, _ = TOOLCHAINS[backend]
    return shutil.which(compiler) or shutil.which(compiler, path=usual_folder)


def require_toolchain(backend: str) -> str:
    """Return the path of the backend's compiler. Raises BuildError with what to install."""
    if path := find_toolchain(backend):
        return path
    compiler, _, package = TOOLCHAINS[backend]
    raise BuildError(f"BACKEND={backend} needs {compiler}, which was not found: install {package}")


def detect_backend() -> str:
    """Return the best backend for this machine's GPUs that can be built here; say so where one will lie idle."""
    nvidia = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    amd = Path("/dev/kfd").exists()
    for backend, vendor, present in (("cuda", "NVIDIA", nvidia), ("hip", "AMD", amd)):
        if not present:
            continue
        if find_toolchain(backend):
            return backend
        compiler, _, package = TOOLCHAINS[backend]
        say(
            f"WARNING: there is an {vendor} GPU, but no {compiler} to build llama.cpp for it. "
            f"Install {package}, then run: make llama BACKEND={backend}"
        )
    any_gpu = nvidia or amd or any(Path("/dev/dri").glob("renderD*"))
    has_headers = any(Path(folder, "vulkan/vulkan.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    return "vulkan" if any_gpu and has_headers and find_toolchain("vulkan") else "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def wheel_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder that holds one folder per key."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loadmaster" / "wheels"


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of this file, waiting for whoever has it, and saying so. The kernel frees it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{busy}, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_wheel(cache: Path, inputs: BuildInputs, environment: Mapping[str, str]) -> Path:
    """Return the wheel built from these inputs, building it where the cache has none. Raises BuildError."""
    finished = cache / inputs.key
    with locked(cache / f"{inputs.key}.lock", "another process builds llama.cpp with the same arguments"):
        if not finished.is_dir():
            for leftover in cache.glob(f"{inputs.key}.tmp-*"):  # of a build that was killed: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{inputs.key}.tmp-", dir=cache) as scratch:
                result = Path(scratch) / "result"
                result.mkdir()
                build_wheel(inputs, Path(scratch), cache / f"{inputs.key}.log", environment)
                (result / "inputs.json").write_text(json.dumps(asdict(inputs), indent=1))
                result.rename(finished)
    (wheel,) = finished.glob("*.whl")
    return wheel


def build_wheel(inputs: BuildInputs, scratch: Path, log_path: Path, environment: Mapping[str, str]) -> None:
    """Build the wheel into ``scratch/result``. Raises BuildError with the end of the log."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    build_environment = {
        **environment,
        "CMAKE_ARGS": " ".join(inputs.cmake_arguments),
        "CMAKE_BUILD_PARALLEL_LEVEL": environment.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0)))),
        "TMPDIR": str(temporary),  # so that an interrupted build leaves nothing anywhere
    }
    if inputs.backend == "cuda":
        build_environment.setdefault("CUDACXX", require_toolchain("cuda"))  # CMake looks on PATH only
    name = inputs.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-binary", name]
    command += ["--wheel-dir", str(scratch / "result"), inputs.requirement]
    say(f"building llama.cpp's tools ({inputs.backend}) from {inputs.requirement}; the full log is {log_path}")
    started = time.monotonic()
    with log_path.open("w") as log, child(command, build_environment) as process:
        assert process.stdout is not None  # noqa: S101  for the type checker: it is a pipe
        follow(process.stdout, log)
        status = process.wait()
    if status != 0:
        raise BuildError(f"llama.cpp's build failed:\n{last_errors(log_path)}\nThe full log is {log_path}")
    say(f"built in {duration(time.monotonic() - started)}")


@contextmanager
def child(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process group of its own, which is ended whichever way this is left."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # compilers hold nothing that needs a goodbye
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def last_errors(log_path: Path) -> str:
    """Return the log's last lines that speak of an error, or its last lines."""
    with log_path.open(errors="replace") as log:
        lines = [line.rstrip() for line in log]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b|FAILED|No such file", line, re.IGNORECASE)]
    return "\n".join((errors or lines)[-SHOWN_LOG_LINES:])


# ---------------------------------------------------------------------------------------------------------------------
# Progress


STEP = re.compile(r"^\s*\[\s*(\d+)(?:/(\d+)|%)\]")  # Ninja's [12/274], make's [ 4%]
PHASES = (
    ("Downloading llama_cpp_python", "downloading the source package"),
    ("Configuring CMake", "configuring"),
    ("Building project", "compiling"),
    ("Making wheel", "packing"),
)


def follow(output: Iterable[str], log: TextIO) -> None:
    """Copy the output to the log and show how far it is: one updating line on a terminal, else one per 10 %."""
    terminal = sys.stderr.isatty()
    started, shown_percent = time.monotonic(), 0
    for line in output:
        log.write(line)
        if step := STEP.match(line):
            done, total = int(step[1]), int(step[2] or 100)
            percent = 100 * done // total
            text = f"compiling: {percent:3d} % ({done} of {total}), {duration(time.monotonic() - started)}"
            if terminal:
                print(f"\r{text} ", end="", file=sys.stderr, flush=True)
            elif percent >= shown_percent + PROGRESS_STEP_PERCENT:
                shown_percent = percent - percent % PROGRESS_STEP_PERCENT
                say(text)
        else:
            for marker, phase in PHASES:
                if marker in line:
                    say(phase)
    if terminal:
        print(file=sys.stderr)


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def say(text: str) -> None:
    """Tell the user; stderr, since nothing here is a result."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment


def server_path() -> Path:
    """Return where the wheel puts llama-server in this environment."""
    return Path(sysconfig.get_path("platlib")) / "bin" / SERVER


def checked_version(server: Path) -> str:
    """Return what ``llama-server --version`` says in an empty environment. Raises BuildError where it does not run.

    Empty, since the service starts it with next to nothing: a library that is found by accident must not count.
    """
    try:
        result = subprocess.run(
            [str(server), "--version"],
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{server} does not run: {error}") from error
    output = (result.stdout + result.stderr).strip()
    version = re.search(r"^version: .*$", output, re.MULTILINE)
    if result.returncode != 0 or version is None:
        raise BuildError(f"{server} --version failed with status {result.returncode}: {output or 'no output'}")
    return version[0]


def read_stamp(stamp: Path) -> dict[str, str]:
    """Return which build is installed; nothing where none is, or it was interrupted."""
    try:
        content = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and server_path().exists() else {}


def install(wheel: Path, inputs: BuildInputs, stamp: Path) -> None:
    """Put the wheel into this environment; the stamp is there only while a whole build is installed.

    Its dependencies come along: the tools do not need them, but an environment that ``pip check`` finds broken would
    be worse than four small packages.
    """
    stamp.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in (["--force-reinstall", "--no-deps", str(wheel)], ["-c", str(CONSTRAINTS), inputs.requirement]):
        result = subprocess.run([*pip, *arguments], stdin=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise BuildError(f"pip could not install {wheel}: see its message above")
    try:
        checked_version(server_path())
    except BuildError as error:
        raise BuildError(f"{error}\nRemove {wheel.parent} to have it built anew") from error
    partial = stamp.with_suffix(".tmp")
    partial.write_text(json.dumps({"key": inputs.key, "backend": inputs.backend}))
    partial.rename(stamp)


def prepare(backend: str | None, *, keep: bool, environment: Mapping[str, str]) -> str:
    """Have llama.cpp's tools installed, and return their version.

    Without a backend this machine decides, or, with ``keep``, whatever is installed already. Raises BuildError.
    """
    stamp = Path(sys.prefix) / "llama-build.json"
    with locked(Path(sys.prefix) / "llama-build.lock", f"another process installs llama.cpp into {sys.prefix}"):
        installed = read_stamp(stamp)
        kept = installed.get("backend") if keep else None
        inputs = gather_inputs(backend or kept or detect_backend(), environment)
        if installed.get("key") != inputs.key:
            install(cached_wheel(wheel_cache(environment), inputs, environment), inputs, stamp)
        return f"llama.cpp's tools ({inputs.backend}) are ready: {checked_version(server_path())}"


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(description="Build and install llama.cpp's tools.", allow_abbrev=False)
    parser.add_argument("--backend", choices=sorted(BACKEND_ARGUMENTS), help="default: what this machine has")
    parser.add_argument("--keep", action="store_true", help="without --backend: the backend of the installed build")
    arguments = parser.parse_args()
    if sys.prefix == sys.base_prefix:
        say("run this with the python of a virtual environment, for example through `make llama`")
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        say(prepare(arguments.backend, keep=arguments.keep, environment=os.environ))
    except BuildError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\ninterrupted: nothing was installed, the next run starts over")
        return 130
    return 0


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Leave as Ctrl-C does, so that children are ended and half a build is removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
