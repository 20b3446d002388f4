"""What llama-server's own lines say, from recordings of the pinned build (fixtures/llama_logs)."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.core.loglines import (
    BufferKind,
    BufferSize,
    ErrorLine,
    Listening,
    UsingDevice,
    device_of,
    last_words,
    read,
    shortage,
)

LOGS = Path(__file__).parents[2] / "fixtures" / "llama_logs"


def facts_of(name: str) -> list[object]:
    return [fact for line in (LOGS / f"{name}.log").read_text().splitlines() if (fact := read(line)) is not None]


def mib(number: float) -> int:
    return round(number * 1024 * 1024)


def test_a_whole_load_is_read() -> None:
    """Every buffer, device and the address of a load over two devices of one worker; not a fact more."""
    first, second = "RPC0[127.0.0.1:50871]", "RPC1[127.0.0.1:50871]"
    assert facts_of("two-rpc-devices") == [
        UsingDevice("RPC0", "127.0.0.1:50871", 24105),
        UsingDevice("RPC1", "127.0.0.1:50871", 24105),
        BufferSize("CPU_Mapped", BufferKind.MODEL, mib(0.06)),
        BufferSize(first, BufferKind.MODEL, mib(0.21)),
        BufferSize(second, BufferKind.MODEL, mib(0.13)),
        BufferSize("CPU", BufferKind.OUTPUT, 0),
        BufferSize(first, BufferKind.CONTEXT, mib(0.19)),
        BufferSize(second, BufferKind.CONTEXT, mib(0.06)),
        BufferSize(first, BufferKind.COMPUTE, mib(1.27)),
        BufferSize(second, BufferKind.COMPUTE, mib(0.96)),
        BufferSize("CPU", BufferKind.COMPUTE, mib(0.84)),
        Listening("http://127.0.0.1:33449"),
    ]


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "truncated-model",
            "tensor 'blk.0.ffn_down.weight' data is not within the file bounds, model is corrupted or incomplete",
        ),
        (
            "no-such-file",
            "gguf_init_from_file: failed to open GGUF file 'nothere.gguf' (No such file or directory)",
        ),
        ("invalid-device", 'error while handling argument "-dev": invalid device: CUDA7'),
        ("quantized-v-without-fa", "llama_init_from_model: quantized V cache requires flash_attn to be enabled"),
        ("worker-unreachable", "ggml-rpc.cpp:547: Failed to connect to 127.0.0.1:1"),
    ],
)
def test_the_line_that_says_why_is_found(name: str, words: str) -> None:
    """Not the last line, which only says that the server exits."""
    told = last_words(fact for fact in facts_of(name) if isinstance(fact, ErrorLine))
    assert told is not None
    assert told.endswith(words)


@pytest.mark.parametrize(
    "line",
    [
        "0.01.000.000 E alloc_buffer: allocating 8192.00 MiB on device 0: cudaMalloc failed: out of memory",
        "0.01.000.000 E alloc_tensor_range: failed to allocate CUDA0 buffer of size 8589934592",
        "0.01.000.000 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "0.01.000.000 E ggml_aligned_malloc: insufficient memory (attempted to allocate 8192.00 MB)",
        "ggml_vulkan: Device memory allocation of size 8589934592 failed.",
        "CUDA error: out of memory",
    ],
)
def test_out_of_memory_is_recognized(line: str) -> None:
    fact = read(line)
    assert isinstance(fact, ErrorLine)
    assert fact.out_of_memory


@pytest.mark.parametrize(
    "lines, words",
    [
        (["alloc_tensor_range: failed to allocate CUDA0 buffer of size 8", "x: failed to load model"], "on CUDA1"),
        (["alloc_tensor_range: failed to allocate CPU buffer of size 8"], "on Host"),
        (["error loading model: unable to allocate RPC0[10.0.0.2:50052] buffer"], "on RPC3"),
        (
            [
                "CUDA error: out of memory",
                "  current device: 0, in function alloc at /src/ggml/src/ggml-cuda/ggml-cuda.cu:560",
                "  cuMemCreate(&handle, reserve_size, &prop, 0)",
                "/src/ggml/src/ggml-cuda/ggml-cuda.cu:109: CUDA error",
            ],
            "on CUDA1",
        ),
        (["ROCm error: out of memory", "  current device: 2, in function alloc at x.cu:1"], "on ROCm2"),
        (["load_model: failed to allocate output buffer of size 8"], ""),
        (["ggml_aligned_malloc: insufficient memory (attempted to allocate 8192.00 MB)"], ""),
    ],
)
def test_whose_memory_ran_out_is_said_in_the_plan_s_words(lines: list[str], words: str) -> None:
    errors = [fact for line in lines if isinstance(fact := read(f"0.01.000.000 E {line}"), ErrorLine)]
    said = shortage(errors, {"CUDA0": "CUDA1", "RPC0[10.0.0.2:50052]": "RPC3"})
    assert str(said) == f"out of memory {words}".strip()


def test_an_allocation_that_failed_long_ago_is_not_what_it_died_of() -> None:
    failed = ErrorLine("failed to allocate memory for prompt cache state", specific=True, out_of_memory=True)
    other = ErrorLine("something else", specific=True, out_of_memory=False)
    assert shortage([failed, *[other] * 20], {}) is None
    assert shortage([], {}) is None


def test_a_complaint_that_is_only_passed_on_serves_where_there_is_no_other() -> None:
    line = read("0.00.000.001 E srv  llama_server: exiting due to model loading error")
    assert isinstance(line, ErrorLine)
    assert last_words([line]) == "llama_server: exiting due to model loading error"
    assert last_words([]) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0.00.001.000 I ~llama_context: CUDA0 compute buffer size is 12.0000 MiB, matches expectation of 12.0000 MiB",
        "0.00.001.000 I llama_kv_cache: size =    0.25 MiB (   256 cells,   4 layers,  2/2 seqs), K (f16):    0.12 MiB",
        "0.00.001.000 W llama_context: n_ctx is not divisible by n_seq_max - rounding down to 512",
        "0.00.001.000 I load_tensors: offloaded 5/5 layers to GPU",
    ],
)
def test_other_lines_say_nothing(line: str) -> None:
    assert read(line) is None


@pytest.mark.parametrize(
    "buffer, device",
    [
        ("CPU", "Host"),
        ("CPU_Mapped", "Host"),
        ("CPU_REPACK", "Host"),
        ("CUDA_Host", "Host"),
        ("CUDA0", "CUDA0"),
        ("RPC0[10.0.0.2:50052]", "RPC3"),
    ],
)
def test_buffers_belong_to_devices(buffer: str, device: str) -> None:
    """Pinned memory is the host's; an RPC buffer counts within its worker, the plan over all workers."""
    assert device_of(buffer, {"RPC0[10.0.0.2:50052]": "RPC3"}) == device
