"""Finds the llama-server that will be launched and asks it which devices it can use.

Asking ``--list-devices`` makes the binary create a context on every GPU, so the answer is kept in the user's cache
folder under everything it depends on. RPC workers are never asked through it: it would hang on a busy one.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpu import kernel_files, llama_cache
from gpu.llama_cache import Answers
from gpu.rpc import PINNED_PROTOCOL
from planner.build import PINNED_BUILD, is_pinned
from planner.types import DeviceKind, LlamaBuild
from planner.units import MIB, format_size
from planner.visible_devices import PCI_ORDER

if TYPE_CHECKING:
    from subprocess import Popen

Environ = Mapping[str, str]

ASK_TIMEOUT_S: Final = 30.0  # a cold driver takes several seconds to bring up a GPU
BUILD_COMMAND: Final = "make llama"
_OLLAMA_FOLDERS: Final = ("/usr/lib/ollama", "/usr/local/lib/ollama")
_MAX_OUTPUT: Final = 1 << 20  # of an answer: sixteen devices take a KiB, a driver's warnings some more

# ggml's names of its devices (the prefix of CUDA0) and of its libraries (libggml-cuda.so).
KIND_BY_PREFIX: Final = {
    "CUDA": DeviceKind.CUDA,
    "ROCm": DeviceKind.ROCM,
    "Vulkan": DeviceKind.VULKAN,
    "SYCL": DeviceKind.SYCL,
    "MTL": DeviceKind.METAL,
    "MUSA": DeviceKind.OTHER,  # of ggml-cuda's source, but nobody has seen what its driver keeps
    "RPC": DeviceKind.RPC,
}
_BACKEND_BY_LIBRARY: Final = {"hip": "rocm"}
# A binary without ggml libraries beside it has them built in; these texts are in it whatever was stripped.
_BACKEND_MARKS: Final = {
    b"ggml_backend_rpc_add_server": "rpc",
    b"found %d CUDA devices": "cuda",  # one source file for the three, and a name in this text (ggml-cuda.cu)
    b"found %d ROCm devices": "rocm",
    b"found %d MUSA devices": "musa",
    b"ggml_vulkan:": "vulkan",
    b"ggml_sycl_": "sycl",
    b"ggml_metal_": "metal",
}
# What makes a processor's CPU backend differ: the vector and matrix extensions (ggml/src/ggml-cpu/arch).
_CPU_FEATURES: Final = re.compile(r"avx\w*|amx\w*|fma|f16c|sse\w*|ssse3|bmi2|neon|asimd\w*|i8mm|sve\w*|sme\d?")

# One line of --list-devices. Ten digits of MiB are more than any device has.
_LISTED: Final = re.compile(r"^[ \t]+([^\s:,]+): (.*) \(([0-9]{1,10}) MiB, ([0-9]{1,10}) MiB free\)\s*$", re.MULTILINE)

# Variables that would change what llama-server does behind the back of the command line.
_SCRUBBED: Final = re.compile(r"LLAMA_ARG_.*|LLAMA_API_KEY|LLAMA_LOG_.*|LLAMA_OFFLINE|MTMD_BACKEND_DEVICE")
# Variables that decide which devices it sees: part of what a cached answer depends on.
_DEVICE_VARIABLES: Final = re.compile(
    r"CUDA_.*|NVIDIA_VISIBLE_DEVICES|HIP_.*|ROCR_.*|HSA_.*|GPU_DEVICE_ORDINAL|GGML_.*|VK_.*|ONEAPI_.*|ZE_.*|LD_.*"
)


@dataclass(frozen=True, slots=True)
class ListedDevice:
    """One line of ``--list-devices``; sizes have MiB resolution.

    ``total_bytes`` None: the device told none, as a full card does. ``free_bytes`` None: the answer is an old one.
    """

    name: str
    kind: DeviceKind
    description: str
    total_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Server:
    """A llama-server that answered: what it is and which devices of this machine it lists, in its own order."""

    build: LlamaBuild
    listed: tuple[ListedDevice, ...]

    def without_free(self) -> Server:
        """Return the server without its devices' free memory, which is true only while the answer is new."""
        return replace(self, listed=tuple(replace(device, free_bytes=None) for device in self.listed))


@dataclass(frozen=True, slots=True)
class Search:
    """The server that was chosen, if any, and one line for each place that was looked at.

    ``failed`` are those of the lines that tell of a llama-server which is there and does not run.
    """

    server: Server | None
    tried: tuple[str, ...]
    failed: tuple[str, ...] = ()

    @property
    def build(self) -> LlamaBuild:
        """Return what plans are made for: where none was found, the pinned build on this processor."""
        return self.server.build if self.server else replace(PINNED_BUILD, cpu_features=cpu_features())

    def not_found(self) -> str | None:
        """Return the error line where there is none: where it was looked for, and the command that builds it."""
        if self.server:
            return None
        return f"no llama-server found; build it with: {BUILD_COMMAND}; looked for: {'; '.join(self.tried)}"


def find(
    environ: Environ, *, configured: Path | None, n_gpus: int, machine_key: Sequence[str] = (), root: Path = Path("/")
) -> Search:
    """Return the configured server, else the first in order that can use this machine's GPUs, else the first.

    ``n_gpus`` is how many GPUs there are to be used; ``machine_key`` names them and their driver, since a cached answer
    holds for them alone. ``root`` is for tests.
    """
    tried: list[str] = []
    failed: list[str] = []
    servers: list[Server] = []
    for label, path in candidates(environ, configured, root):
        if path is None or not os.path.isfile(path):  # noqa: PTH113 - a folder we may not enter is no error here
            tried.append(f"{label if path is None else f'{label} {path}'} (not there)")
            continue
        server = ask(path, environ, machine_key=machine_key)
        if isinstance(server, str):
            failed.append(f"{label} {path} ({server})")
            tried.append(failed[-1])
            continue
        tried.append(f"{label} {path} (version {server.build.version}, {len(server.listed)} devices)")
        servers.append(server)
        if len(server.listed) >= n_gpus:
            break
    # max keeps the first of equals, which is the search order.
    return Search(max(servers, key=lambda server: len(server.listed), default=None), tuple(tried), tuple(failed))


def candidates(environ: Environ, configured: Path | None, root: Path = Path("/")) -> Iterator[tuple[str, Path | None]]:
    """Yield (what it is, path) of every llama-server to try, in order, each file once; None: PATH has none."""
    if configured is not None:
        yield "PLANNER_LLAMA_SERVER", configured
        return
    seen: set[str] = set()
    for label, path in _places(environ, root):
        real = os.path.realpath(path or "")
        if path is None or real not in seen:
            seen.add(real)
            yield label, path


def _places(environ: Environ, root: Path) -> Iterator[tuple[str, Path | None]]:
    spec = find_spec("llama_cpp")  # finds the package without importing it, which would load llama.cpp
    if spec is not None and spec.origin is not None:
        yield "embedded", Path(spec.origin).parent.parent / "bin/llama-server"
    folders = (folder for folder in environ.get("PATH", "").split(os.pathsep) if folder.startswith("/"))
    on_path = (Path(folder) / "llama-server" for folder in folders)
    yield "PATH", next((path for path in on_path if os.access(path, os.X_OK)), None)
    for ollama in _OLLAMA_FOLDERS:
        yield "Ollama's", root / ollama.lstrip("/") / "llama-server"
    if environ.get("HOME"):
        yield "home", Path(environ["HOME"]) / "llama.cpp/build/bin/llama-server"


def ask(
    path: Path,
    environ: Environ,
    *,
    machine_key: Sequence[str] = (),
    fresh: bool = False,
    timeout_s: float = ASK_TIMEOUT_S,
) -> Server | str:
    """Return what the server at ``path`` answers, from the cache unless ``fresh``, or one phrase that says why not."""
    real = Path(os.path.realpath(path))
    key = _cache_key(real, environ, machine_key)
    answers = None if fresh else llama_cache.load(environ, key)
    if answers is None:
        try:
            answers = Answers(
                version=_run(path, "--version", environ, timeout_s),
                list_devices=_run(path, "--list-devices", environ, timeout_s),
                backends=",".join(sorted(_backends(real))),
            )
        except _NoAnswerError as error:
            return str(error)
        llama_cache.store(environ, key, answers)
        fresh = True
    listed = parse_list(answers.list_devices)
    server = Server(_build(path, real, answers, listed), listed)
    return server if fresh else server.without_free()


def refresh(server: Server, environ: Environ, *, machine_key: Sequence[str] = ()) -> Server:
    """Return the server with the free memory of this moment, where it still answers."""
    again = ask(Path(server.build.path or ""), environ, machine_key=machine_key, fresh=True)
    return server if isinstance(again, str) else again


def _environment(environ: Environ, config_home: str) -> dict[str, str]:
    """Return the environment in which llama-server is asked.

    A restriction to some devices (CUDA_VISIBLE_DEVICES and its like) is the operator's and stays; CUDA's order is made
    NVML's. ``config_home`` is an empty folder, since a user's own llama.cpp configuration would add flags.
    """
    kept = {name: value for name, value in environ.items() if not _SCRUBBED.fullmatch(name)}
    return kept | {**PCI_ORDER, "GGML_NO_BACKTRACE": "1", "XDG_CONFIG_HOME": config_home}


def parse_list(text: str) -> tuple[ListedDevice, ...]:
    """Return the devices of a ``--list-devices`` answer (common/arg.cpp, common_print_available_devices), GPUs only.

    Whatever else is printed there, such as a driver's warnings, is passed over; of two lines with one name the first
    one holds.
    """
    devices: dict[str, ListedDevice] = {}
    for name, description, total, free in _LISTED.findall(text):
        free_mib = min(int(free), int(total))
        device = ListedDevice(name, kind_of(name), description, int(total) * MIB or None, free_mib * MIB)
        # An accelerator without memory of its own (BLAS) is listed with 0 MiB and takes no layers.
        is_idle = device.kind is DeviceKind.OTHER and device.total_bytes is None
        if not is_idle and device.kind is not DeviceKind.RPC:
            devices.setdefault(name, device)
    return tuple(devices.values())


def kind_of(name: str) -> DeviceKind:
    """Return the kind of a device by llama.cpp's name for it."""
    return KIND_BY_PREFIX.get(name.rstrip("0123456789"), DeviceKind.OTHER)


def cpu_features(root: Path = Path("/")) -> frozenset[str]:
    """Return this processor's vector and matrix extensions by the kernel's names for them (``avx2``, ``asimddp``)."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", kernel_files.text(root / "proc/cpuinfo"), re.MULTILINE)
    words = match.group(1).split() if match else []
    return frozenset(word for word in words if _CPU_FEATURES.fullmatch(word))


class _NoAnswerError(Exception):
    """The binary did not answer; the text says how."""


def _run(path: Path, flag: str, environ: Environ, timeout_s: float) -> str:
    import subprocess  # noqa: PLC0415 - a cached answer spares both imports, 10 ms of a command that has 200
    import tempfile  # noqa: PLC0415 - likewise

    with tempfile.TemporaryDirectory(prefix="loadmaster-") as empty:
        try:
            child = subprocess.Popen(  # noqa: S603 - the binary that is to be launched, with a constant flag
                [str(path), flag],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(environ, empty),
                process_group=0,  # a script around the binary is ended with what it started
            )
        except OSError as error:
            raise _NoAnswerError(f"cannot be started: {error.strerror}") from None
        with child:
            try:
                text = _read(child, time.monotonic() + timeout_s)
            except (TimeoutError, subprocess.TimeoutExpired):
                raise _NoAnswerError(f"{flag} gave no answer within {timeout_s:g} s") from None
            finally:
                if child.returncode is None:
                    os.killpg(child.pid, signal.SIGKILL)
    if child.returncode != 0:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise _NoAnswerError(f"{flag} ended with status {child.returncode}: {last[:200]}")
    return text


def _read(child: Popen[bytes], deadline: float) -> str:
    """Return what a child printed until it ended. Raises TimeoutError, TimeoutExpired, _NoAnswerError."""
    import select  # noqa: PLC0415 - as subprocess: not needed where the answer is cached

    if child.stdout is None:
        return ""
    data, ready = b"", select.poll()
    ready.register(child.stdout, select.POLLIN)
    while ready.poll(max(deadline - time.monotonic(), 0) * 1000):
        part = os.read(child.stdout.fileno(), _MAX_OUTPUT)
        if not part:
            child.wait(max(deadline - time.monotonic(), 0))
            return data.decode("utf-8", "replace")
        data += part
        if len(data) > _MAX_OUTPUT:
            raise _NoAnswerError(f"prints more than {format_size(_MAX_OUTPUT)}")
    raise TimeoutError


def _build(path: Path, real: Path, answers: Answers, listed: Iterable[ListedDevice]) -> LlamaBuild:
    # "version: 0.5.0-dev (build 1, commit 0c1e570)"; before 2026 "version: 4567 (0c1e570)".
    match = re.search(r"version: (\S+)(?: \((?:build \d+, commit )?(\w+)\))?", answers.version)
    version, commit = match.groups() if match else (None, None)
    library = next((file for folder in _library_folders(real) if (file := folder / "libllama.so").exists()), None)
    build = LlamaBuild(
        path=str(path),
        version=version,
        commit=commit,
        backends=frozenset(answers.backends.split(",")) | {device.kind.value for device in listed},
        cpu_features=cpu_features(),
        library_path=None if library is None else str(library),
    )
    return replace(build, rpc_protocol=PINNED_PROTOCOL if is_pinned(build) else None)


def _library_folders(real: Path) -> tuple[Path, ...]:
    return real.parent, real.parent.parent / "lib", real.parent.parent / "lib64"


def _backends(real: Path) -> frozenset[str]:
    """Return the backends of a binary: the ggml libraries beside it or, where there are none, those built in."""
    names = {
        match.group(1)
        for folder in _library_folders(real)
        for file in folder.glob("libggml-*.so")
        if (match := re.match(r"libggml-([a-z]+)", file.name))
    }
    if not names:
        if not os.access(real, os.R_OK):
            return frozenset()
        with real.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
            names = {"cpu", *(backend for mark, backend in _BACKEND_MARKS.items() if binary.find(mark) >= 0)}
    return frozenset(_BACKEND_BY_LIBRARY.get(name, name) for name in names - {"base"})


def _cache_key(real: Path, environ: Environ, machine_key: Sequence[str]) -> tuple[str, ...]:
    # The folders' times show that a backend's library was added beside an unchanged binary.
    stats = [real.stat(), *(folder.stat() for folder in _library_folders(real) if folder.is_dir())]
    seen = [f"{name}={value}" for name, value in sorted(environ.items()) if _DEVICE_VARIABLES.fullmatch(name)]
    return (str(real), *(f"{stat.st_mtime_ns}/{stat.st_size}" for stat in stats), *seen, *machine_key)
