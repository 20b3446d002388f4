"""What shapes a build of llama.cpp's tools: the backend for this machine, and all that makes one wheel unlike another.

Only the standard library: this runs before anything else is installed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

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
INCLUDE_FOLDERS = ("/usr/include", "/usr/local/include")
# How to ask for the architectures that a native build is made for: another card needs another build.
DEVICE_QUERIES: Mapping[str, tuple[str, ...]] = {
    "cuda": ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"),
    "hip": ("rocm_agent_enumerator",),
}
SHAPING_VARIABLES = ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "HIPFLAGS")

PROBE_TIMEOUT_S = 60.0  # a compiler's --version; a cold ROCm takes seconds


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
    """Return the path of the backend's compiler; None without it, or without the headers that it needs."""
    compiler, usual_folder, _ = TOOLCHAINS[backend]
    if backend == "vulkan" and not any(Path(folder, "vulkan/vulkan.h").exists() for folder in INCLUDE_FOLDERS):
        return None
    return shutil.which(compiler) or shutil.which(compiler, path=usual_folder)


def require_toolchain(backend: str) -> str:
    """Return the path of the backend's compiler. Raises BuildError with what to install."""
    if path := find_toolchain(backend):
        return path
    compiler, _, package = TOOLCHAINS[backend]
    raise BuildError(f"BACKEND={backend} needs {compiler} and its libraries, which were not found: install {package}")


def toolchain_variables(backend: str) -> dict[str, str]:
    """Return what tells CMake where the backend's compiler lies, since it looks on PATH only."""
    match backend:
        case "cuda":
            return {"CUDACXX": require_toolchain("cuda")}
        case "hip":  # as llama.cpp's docs/build.md does it
            hipconfig = str(Path(require_toolchain("hip")).with_name("hipconfig"))
            clang_folder, rocm_folder = (probe((hipconfig, option)).strip() for option in ("-l", "-R"))
            return {"HIPCXX": f"{clang_folder}/clang", "HIP_PATH": rocm_folder}
        case _:
            return {}


def detect_backend(
    dev: Path = Path("/dev"), find: Callable[[str], str | None] = find_toolchain
) -> tuple[str, tuple[str, ...]]:
    """Return the best backend for this machine's GPUs that can be built here, and a warning for each GPU left out."""
    nvidia = (dev / "nvidiactl").exists() or (dev / "dxg").exists()  # dxg: Windows' subsystem for Linux
    amd = (dev / "kfd").exists()
    any_gpu = nvidia or amd or any((dev / "dri").glob("renderD*"))
    warnings: list[str] = []
    for backend, gpu, present in (
        ("cuda", "an NVIDIA GPU", nvidia),
        ("hip", "an AMD GPU", amd),
        ("vulkan", "a GPU", any_gpu),
    ):
        if present and find(backend):
            return backend, tuple(warnings)
        if present and not (backend == "vulkan" and warnings):  # that GPU has been named already
            compiler, _, package = TOOLCHAINS[backend]
            warnings.append(
                f"WARNING: there is {gpu}, but no {compiler} to build llama.cpp for it. "
                f"Install {package}, then run: make llama BACKEND={backend}"
            )
    return "cpu", tuple(warnings)
