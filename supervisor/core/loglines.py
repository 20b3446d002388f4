"""What one line of a llama-server started with ``-lv 4`` says: a fact, or nothing that matters here.

The texts are those of llama.cpp 0.5.0-dev: common/log.cpp (the prefix), src/llama-model.cpp (model buffers),
src/llama-kv-cache.cpp, src/llama-memory-recurrent.cpp (context), src/llama-context.cpp ``sched_reserve`` (compute),
tools/server/server.cpp (the address), ggml/src/ggml-backend*.cpp and ggml-cuda.cu (allocation failures, aborts).
Sizes are printed in MiB with two decimals, so a figure read here is exact to 0.005 MiB.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from planner.types import HOST


class BufferKind(StrEnum):
    """llama.cpp's three accounts; its output buffer belongs to none of them."""

    MODEL = "model"
    CONTEXT = "context"
    COMPUTE = "compute"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class BufferSize:
    """A buffer was reserved. ``buffer`` is llama.cpp's name of the buffer type, not of the device."""

    buffer: str
    kind: BufferKind
    size_bytes: int


@dataclass(frozen=True, slots=True)
class UsingDevice:
    """llama.cpp uses this device; ``description`` of an RPC device is the worker's address.

    ``device_id`` is a card's PCI address in lower case, None where its backend has none.
    """

    name: str
    description: str
    free_mib: int
    device_id: str | None = None


@dataclass(frozen=True, slots=True)
class PromptCache:
    """What the prompt cache has taken of the host's memory by now (tools/server/server-task.cpp, ``update``)."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Listening:
    """The server has loaded, and answers at this address."""

    url: str


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """A complaint. ``specific`` is False for those that only pass an earlier one on.

    ``buffer`` is the buffer type whose allocation failed, where the line names one.
    """

    text: str
    specific: bool
    out_of_memory: bool
    buffer: str | None = None


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory ran out on this device; None: it was not said where."""

    device: str | None

    def __str__(self) -> str:
        """Return the words that a failure's reason has for it."""
        return "out of memory" if self.device is None else f"out of memory on {self.device}"


Fact = BufferSize | UsingDevice | Listening | ErrorLine | PromptCache

MIB: Final = 1024 * 1024
LAST_WORDS: Final = 12  # a fatal allocation is passed on in 8 lines; one that was survived lies further back

_PREFIX = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} (?P<level>[IWED]) (?:(?:srv|cmn|slot|que|mtmd) +)?")
_BUFFER = re.compile(
    r"^\w+: +(?P<buffer>\S+) +(?P<kind>model|KV|RS|compute|output) buffer size = +(?P<mib>\d+\.\d+) MiB$"
)
_DEVICE = re.compile(
    r"^\w+: using device (?P<name>\S+) \((?P<description>.*)\) \((?P<id>[^()]*)\) - (?P<free>\d+) MiB free$"
)
_PROMPT_CACHE: Final = b" - cache state: "
_CACHED = re.compile(rb"\d+ prompts, (?P<mib>\d+\.\d+) MiB ")
_UNKNOWN_ID: Final = "unknown id"  # src/llama.cpp, llama_prepare_model_devices
_LISTENING = re.compile(r"^llama_server: listening on (?P<url>\S+)$")
# How a line begins that is no complaint (or goes on with one that is none), and what is in all that state a fact.
_NO_COMPLAINT = re.compile(rb"\n(?:\d+\.\d\d\.\d{3}\.\d{3} [IWD] |\t)")
_STATED: Final = (b"buffer size", b"using device", b"listening on")
_UNPREFIXED_ERROR = re.compile(
    r"^error\b|^cannot start |^terminate called|\.(?:c|cc|cpp|cu|cuh|h|hpp|m):\d+: |^(?:CUDA|ROCm) error|^ggml_vulkan: "
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfDeviceMemory|insufficient memory|failed to allocate|unable to allocate"
    r"|allocation of size \d+ failed"
)
_FAILED_BUFFER = re.compile(r"(?:failed|unable) to allocate (?!output|compute)(?P<buffer>\S+) buffer\b")
# ggml-cuda.cu, ``ggml_cuda_error``: two lines one after the other, the second with the device as this process counts.
_BACKEND_ERROR = re.compile(r"^(?P<backend>CUDA|ROCm) error: ")
_CURRENT_DEVICE = re.compile(r"^current device: (?P<index>\d+), in function ")
_ABORT_PLACE = re.compile(r"^\S*/(?P<file>[\w.-]+\.(?:c|cc|cpp|cu|cuh|h|hpp|m):\d+: )")
_PASSED_ON = re.compile(
    r"exiting due to|failed to load model|failed to create.context with model|cleaning up before exit"
    r"|failed to initialize the context"
)
_KINDS: Final = {
    "model": BufferKind.MODEL,
    "KV": BufferKind.CONTEXT,
    "RS": BufferKind.CONTEXT,
    "compute": BufferKind.COMPUTE,
    "output": BufferKind.OUTPUT,
}


def state_nothing(lines: bytes) -> bool:
    """Say at little cost that none of these lines states a fact, as hardly any does of two hundred for each request."""
    n_plain = len(_NO_COMPLAINT.findall(b"\n" + lines))
    return n_plain == lines.count(b"\n") + 1 and not any(words in lines for words in _STATED)


def read(line: str) -> Fact | None:
    """Return the fact that this line states, or None."""
    prefix = _PREFIX.match(line)
    text = line[prefix.end() :] if prefix else line
    if found := _BUFFER.match(text):
        size_bytes = round(float(found["mib"]) * MIB)
        return BufferSize(found["buffer"], _KINDS[found["kind"]], size_bytes)
    if found := _DEVICE.match(text):
        device_id = None if found["id"] == _UNKNOWN_ID else found["id"].lower()
        return UsingDevice(found["name"], found["description"], int(found["free"]), device_id)
    if found := _LISTENING.match(text):
        return Listening(found["url"])
    if (prefix["level"] == "E") if prefix else bool(_UNPREFIXED_ERROR.search(text)):
        text = _ABORT_PLACE.sub(r"\g<file>", text.strip())
        failed = _FAILED_BUFFER.search(text)
        return ErrorLine(
            text,
            specific=not _PASSED_ON.search(text),
            out_of_memory=bool(_OUT_OF_MEMORY.search(text)),
            buffer=failed["buffer"] if failed else None,
        )
    return None


def prompt_cache(lines: bytes) -> PromptCache | None:
    """Return what the last of these lines says of the prompt cache, None where none does; at little cost, too."""
    at = lines.rfind(_PROMPT_CACHE)
    found = None if at < 0 else _CACHED.match(lines, at + len(_PROMPT_CACHE))
    return None if found is None else PromptCache(round(float(found["mib"]) * MIB))


def device_of(buffer: str, buffer_devices: Mapping[str, str]) -> str:
    """Return the device that a buffer type belongs to. Host memory that a GPU driver pinned is the host's.

    ``buffer_devices`` names the devices of RPC buffers, whose own index counts within one worker.
    """
    if buffer in buffer_devices:
        return buffer_devices[buffer]
    is_host = buffer.startswith(("CPU", "BLAS")) or buffer.endswith("_Host")
    return HOST if is_host else buffer


def last_words(errors: Iterable[ErrorLine]) -> str | None:
    """Return the line that says most about why the server died: the last one that is not only passed on."""
    told = list(errors)
    for candidates in ([one for one in told if one.specific], told):
        if candidates:
            return candidates[-1].text
    return None


def shortage(errors: Iterable[ErrorLine], buffer_devices: Mapping[str, str]) -> Shortage | None:
    """Return whose memory ran out, where that is what the server died of."""
    told = list(errors)[-LAST_WORDS:]
    failed = [one for one in told if one.out_of_memory]
    buffers = [one.buffer for one in failed if one.buffer is not None] or _at_run_time(told)
    if buffers:
        return Shortage(device_of(buffers[0], buffer_devices))
    return Shortage(None) if failed else None


def _at_run_time(errors: Sequence[ErrorLine]) -> list[str]:
    """Return the devices on which a computation, rather than the load, ran out of memory."""
    return [
        f"{backend['backend']}{device['index']}"
        for error, place in itertools.pairwise(errors)
        if error.out_of_memory
        and (backend := _BACKEND_ERROR.match(error.text))
        and (device := _CURRENT_DEVICE.match(place.text))
    ]
