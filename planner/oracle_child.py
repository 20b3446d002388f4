"""The oracle's child: ``python -m planner.oracle_child``, one question as JSON on stdin, the answer on stdout.

The question is ``planner.oracle``'s; the answer's ``rows`` are ``[[model, context, compute], ...]`` in bytes, the host
last, and ``as_reserved`` says whether the compute buffers are a real load's (else they are upper bounds). The
structures are those of include/llama.h at the pinned commit; their defaults are checked before they are trusted. A C++
exception in the library ends the process, which the parent takes for no answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from ctypes import (
    POINTER,
    c_bool,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import Any, Final, NamedTuple

from planner.flag_table import POOLING_TYPES
from planner.ggml import BY_NAME
from planner.oracle_reservation import Reservation

MAX_DEVICES: Final = 16
WORKER_READY_S: Final = 5.0
WORKER_POLL_S: Final = 0.005
BIND_ATTEMPTS: Final = 5  # a port found free may be taken before the worker binds it

_PR_SET_PDEATHSIG: Final = 1
_LOG_LEVEL_ERROR: Final = 4
_DEVICE_TYPE_CPU: Final = 0
_SPLIT_MODE: Final = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
_LAZY_MODE: Final = {"off": 0, "auto": 1, "on": 2}
_TAGS: Final = {"int": 0, "float": 1, "bool": 2, "str": 3}
_FLASH_ATTN: Final = {"auto": -1, "off": 0, "on": 1}
_MEMORY_DATA: Final = (
    "_Z29common_get_device_memory_dataPKcPK18llama_model_paramsPK20llama_context_paramsRSt6vectorIP19ggml_backend_device"
    "SaIS9_EERjSD_SD_14ggml_log_level"
)


class BufferOverride(ctypes.Structure):
    """``llama_model_tensor_buft_override``."""

    _fields_ = (("pattern", c_char_p), ("buft", c_void_p))


class MetadataValue(ctypes.Union):
    """The value of a ``llama_model_kv_override``."""

    _fields_ = (("int", c_int64), ("float", c_double), ("bool", c_bool), ("str", c_char * 128))


class MetadataOverride(ctypes.Structure):
    """``llama_model_kv_override``; the last of a list has an empty key."""

    _fields_ = (("tag", c_int), ("key", c_char * 128), ("value", MetadataValue))


class ModelParams(ctypes.Structure):
    """``llama_model_params``."""

    _fields_ = (
        ("devices", POINTER(c_void_p)),
        ("tensor_buft_overrides", POINTER(BufferOverride)),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", POINTER(MetadataOverride)),
        *(
            (name, c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ),
    )


class ContextParams(ctypes.Structure):
    """``llama_context_params``."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *(
            (name, c_int)
            for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")
        ),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        *((name, c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c_int) for name in ("type_k", "type_v")),
        *((name, c_void_p) for name in ("abort_callback", "abort_callback_data")),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class MemoryData(ctypes.Structure):
    """``common_device_memory_data`` (common/fit.h)."""

    _fields_ = (
        ("total", c_int64),
        ("free", c_int64),
        *((name, c_size_t) for name in ("model", "context", "compute")),
    )


class Vector(ctypes.Structure):
    """A ``std::vector``: begin, end, end of storage."""

    _fields_ = (("begin", c_void_p), ("end", c_void_p), ("storage_end", c_void_p))


class Libraries(NamedTuple):
    """llama.cpp's libraries of one folder, one copy of each."""

    base: ctypes.CDLL
    ggml: ctypes.CDLL
    llama: ctypes.CDLL
    common: ctypes.CDLL


class Unusable(Exception):
    """The libraries are not those that this module was written for."""


def main() -> int:
    """Answer the question on stdin; 0 where there is an answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # the library may print; stdout is for the answer alone
    question = json.load(sys.stdin)
    try:
        libraries = load(Path(question["folder"]))
        with contextlib.ExitStack() as stack:
            if question["worker"]:
                count = question["devices"].count(None)
                add_worker(libraries, stack.enter_context(worker(question["worker"], count)))
            reservation = Reservation(libraries.base, libraries.llama)
            rows = memory(libraries, question)
    except (OSError, AttributeError, Unusable) as error:
        sys.stderr.write(f"oracle: {error}\n")
        return 1
    os.write(answer_fd, json.dumps({"rows": rows, "as_reserved": reservation.complete}).encode())
    return 0


def load(folder: Path) -> Libraries:
    """Load the libraries of this folder. Raises OSError or AttributeError where they are not what is expected."""
    names = ("libggml-base.so.0", "libggml.so.0", "libllama.so.0", "libllama-common.so.0")
    libraries = Libraries(*(ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names))
    for function in ("ggml_backend_dev_by_name", "ggml_backend_reg_by_name", "ggml_backend_dev_by_type"):
        _function(libraries, function).restype = c_void_p
    for function in ("ggml_backend_dev_buffer_type", "ggml_backend_reg_get_proc_address"):
        _function(libraries, function).restype = c_void_p
    libraries.llama.llama_model_default_params.restype = ModelParams
    libraries.llama.llama_context_default_params.restype = ContextParams
    libraries.ggml.ggml_backend_load_all()
    return libraries


def _function(libraries: Libraries, name: str) -> Any:
    """Return the function from whichever of ggml's libraries has it."""
    for library in (libraries.ggml, libraries.base):
        with contextlib.suppress(AttributeError):
            return getattr(library, name)
    raise AttributeError(name)


def memory(libraries: Libraries, question: Mapping[str, Any]) -> list[list[int]]:
    """Return [model, context, compute] of each device and of the host, as llama.cpp reckons them."""
    model_params = _model_params(libraries, question)
    context_params = _context_params(libraries, question["params"])
    function = getattr(libraries.common, _MEMORY_DATA)
    function.restype = Vector  # 24 bytes: returned through a hidden pointer, as C++ does with a class like this
    devices = Vector()
    numbers = [c_uint32() for _ in range(3)]
    result = function(
        str(question["model"]).encode(),
        ctypes.byref(model_params),
        ctypes.byref(context_params),
        ctypes.byref(devices),
        *(ctypes.byref(number) for number in numbers),
        _LOG_LEVEL_ERROR,
    )
    count = (result.end - result.begin) // ctypes.sizeof(MemoryData)
    rows = (MemoryData * count).from_address(result.begin)
    return [[row.model, row.context, row.compute] for row in rows]


def _model_params(libraries: Libraries, question: Mapping[str, Any]) -> ModelParams:
    params: ModelParams = libraries.llama.llama_model_default_params()
    known = (params.n_gpu_layers, params.split_mode, params.main_gpu, params.use_extra_bufts, params.load_mtp)
    if known != (-1, 1, 0, True, False):
        raise Unusable("llama_model_params has another layout")
    wanted = question["params"]
    devices = _devices(libraries, question["devices"])
    shares = (c_float * MAX_DEVICES)(*question["tensor_split"])
    params.devices = (c_void_p * (len(devices) + 1))(*devices, None)
    params.tensor_split = shares
    params.tensor_buft_overrides = _overrides(libraries, wanted["overrides"], question["names"], devices)
    params.kv_overrides = _metadata_overrides(question["kv_overrides"])
    params.load_mtp = wanted["loads_draft_head"]
    params.n_gpu_layers = question["n_gpu_layers"]
    params.split_mode = _SPLIT_MODE[wanted["split_mode"]]
    params.lazy_mode = _LAZY_MODE[wanted["lazy_mode"]]
    params.use_extra_bufts = wanted["repack"]
    params.no_host = not wanted["use_host_buffer"]
    return params


def _context_params(libraries: Libraries, wanted: Mapping[str, Any]) -> ContextParams:
    params: ContextParams = libraries.llama.llama_context_default_params()
    known = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.pooling_type, params.type_k)
    switches = (params.flash_attn_type, params.offload_kqv, params.op_offload, params.swa_full, params.kv_unified)
    if known != (512, 2048, 512, 1, -1, 1) or switches != (-1, True, True, True, False):
        raise Unusable("llama_context_params has another layout")
    params.n_ctx = wanted["n_ctx_unpadded"]
    for name in (
        "n_batch",
        "n_ubatch",
        "n_seq_max",
        "n_outputs_max",
        "n_rs_seq",
        "swa_full",
        "kv_unified",
        "op_offload",
        "embeddings",
    ):
        setattr(params, name, wanted[name])
    params.n_outputs_max_per_seq = 1
    params.pooling_type = -1 if wanted["pooling"] is None else POOLING_TYPES.index(wanted["pooling"])
    params.flash_attn_type = _FLASH_ATTN[wanted["flash_attn"]]
    params.type_k = BY_NAME[wanted["cache_type_k"]].id
    params.type_v = BY_NAME[wanted["cache_type_v"]].id
    params.offload_kqv = wanted["kv_offload"]
    return params


def _devices(libraries: Libraries, names: list[str | None]) -> list[int]:
    """Return the handles; stand-ins are the worker's devices in order, which are named RPC0, RPC1 and so on."""
    handles = []
    stand_ins = 0
    for name in names:
        known = f"RPC{stand_ins}" if name is None else name
        stand_ins += name is None
        handle = _function(libraries, "ggml_backend_dev_by_name")(known.encode())
        if not handle:
            raise Unusable(f"no device {known}")
        handles.append(handle)
    return handles


def _overrides(libraries: Libraries, pairs: list[tuple[str, str]], names: list[str], devices: list[int]) -> Any:
    if not pairs:
        return None
    buffer_type = _function(libraries, "ggml_backend_dev_buffer_type")
    types = {name: c_void_p(device) for name, device in zip(names, devices, strict=True)}
    types["CPU"] = c_void_p(_function(libraries, "ggml_backend_dev_by_type")(_DEVICE_TYPE_CPU))
    unknown = next((buffer for _, buffer in pairs if buffer not in types), None)
    if unknown is not None:
        raise Unusable(f"no buffer type {unknown}")
    rows = [BufferOverride(pattern.encode(), buffer_type(types[buffer])) for pattern, buffer in pairs]
    return (BufferOverride * (len(rows) + 1))(*rows)


def _metadata_overrides(pairs: list[tuple[str, Any]]) -> Any:
    rows = [MetadataOverride(_TAGS[kind], key.encode(), _metadata_value(value, kind))
            for key, value in pairs for kind in [type(value).__name__]]  # fmt: skip
    return (MetadataOverride * (len(rows) + 1))(*rows) if rows else None


def _metadata_value(value: Any, kind: str) -> MetadataValue:
    return MetadataValue(**{kind: value.encode() if kind == "str" else value})


@contextlib.contextmanager
def worker(binary: str, n_devices: int) -> Iterator[str]:
    """Run a worker with that many CPU devices on loopback and yield its address. It dies with this process."""
    for _ in range(BIND_ATTEMPTS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(  # noqa: S603 - the binary that belongs to the library asked
            [binary, "-H", "127.0.0.1", "-p", str(port), "-t", "1", "-d", ",".join(["CPU"] * n_devices)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        try:
            if _answers(process, port):
                yield f"127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
    raise Unusable("no port for a stand-in worker")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the worker accepts connections; False where it ended or took too long."""
    deadline = time.monotonic() + WORKER_READY_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        time.sleep(WORKER_POLL_S)
    return False


def add_worker(libraries: Libraries, endpoint: str) -> None:
    """Make the worker's devices known to ggml (common/arg.cpp, ``add_rpc_devices``)."""
    registry = _function(libraries, "ggml_backend_reg_by_name")(b"RPC")
    if not registry:
        raise Unusable("this build has no RPC backend")
    get = _function(libraries, "ggml_backend_reg_get_proc_address")
    address = get(c_void_p(registry), b"ggml_backend_rpc_add_server")
    add = ctypes.CFUNCTYPE(c_void_p, c_char_p)(address)
    _function(libraries, "ggml_backend_register")(c_void_p(add(endpoint.encode())))


if __name__ == "__main__":
    sys.exit(main())
