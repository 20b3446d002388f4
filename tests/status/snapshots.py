"""Snapshots to render: a machine with much going on, and one that has just started."""

from __future__ import annotations

from types import MappingProxyType

from planner.types import HOST, HOST_POOL, Decision, Device, DeviceKind, DeviceName, Machine, PoolId, ProcessUse, Role
from supervisor.api.models import ModelView
from supervisor.api.snapshot import (
    DeviceLedger,
    DeviceUse,
    FailureView,
    ModelCounters,
    RunnerView,
    Snapshot,
    TokenCounts,
)

GIB = 1 << 30
NOW = 1_800_000_000.0


def _gpu(name: str, total_gib: int, free_gib: int, description: str, *, why_not: str | None = None) -> Device:
    return Device(
        DeviceName(name),
        DeviceKind.CUDA,
        total_gib * GIB,
        free_gib * GIB,
        PoolId(name.lower()),
        description=description,
        uuid=f"GPU-{name}",
        usable=why_not is None,
        why_not=why_not,
        processes=(ProcessUse(4321, "Xorg", GIB // 2),),
    )


MACHINE = Machine(
    devices=(
        _gpu("CUDA0", 24, 5, "NVIDIA GeForce RTX 4090"),
        _gpu("CUDA1", 12, 11, "NVIDIA GeForce RTX 3060", why_not="this llama-server was built for other cards"),
    ),
    host=Device(HOST, DeviceKind.HOST, 64 * GIB, 40 * GIB, HOST_POOL, description="AMD Ryzen 9 5950X"),
    warnings=("CUDA1 stays idle: run `make llama BACKEND=cuda`",),
)

READY = RunnerView(
    id="runner-1",
    model="qwen/chat-32b",
    role=Role.CHAT,
    state="ready",
    pid=7001,
    url="http://127.0.0.1:40001",
    since=NOW - 500,
    in_flight=1,
    waiting=2,
    restarts=1,
    n_ctx_per_slot=40_960,
    n_parallel=2,
    expires_at=NOW + 240,
    keep_alive_s=300.0,
    retry_at=None,
    load_seconds=12.5,
    plan=MappingProxyType(
        {
            "schema": 1,
            "headline": "Fits on the GPU: 41 of 41 layers, two conversations of 40,960 tokens each.",
            "launch": {
                "argv": ["llama-server", "-m", "/models/qwen/chat-32b.gguf", "-c", "81920", "-np", "2"],
                "env": {},
            },
        }
    ),
    uses=(DeviceUse("CUDA0", 17 * GIB, 17 * GIB - 4096), DeviceUse("Host", GIB, GIB)),
    last_failure=FailureView(
        NOW - 900, "CUDA error: out of memory", "killed by SIGABRT", ("current device: 0", "CUDA error: out of memory")
    ),
    remedies=(Decision("out of memory", "plan again with 5% more room on CUDA0", "exit status 1"),),
)
LOADING = RunnerView(
    id="runner-2",
    model='odd "name"\\',
    role=Role.EMBEDDING,
    state="loading",
    pid=7002,
    url=None,
    since=NOW - 2,
    in_flight=0,
    waiting=1,
    restarts=0,
    n_ctx_per_slot=None,
    n_parallel=None,
    expires_at=None,
    keep_alive_s=300.0,
    retry_at=None,
    load_seconds=None,
    plan=None,
    uses=(DeviceUse("Host", GIB // 2, None),),
    last_failure=None,
)


def _model(name: str, role: Role, *, problem: str | None = None) -> ModelView:
    return ModelView(name, f"/models/{name}.gguf", role, "qwen3", 17 * GIB, NOW - 86_400, 131_072, None, problem)


def busy_machine() -> Snapshot:
    """Return two cards, a ready and a loading runner, a model that cannot be served, and some history."""
    return Snapshot(
        version="0.1.0",
        started_at=NOW - 3600,
        now=NOW,
        draining=False,
        not_ready=(),
        llama_server="/opt/llama-server",
        llama_version="b1-0c1e570",
        machine=MACHINE,
        runners=(READY, LOADING),
        models=(
            _model(READY.model, Role.CHAT),
            _model(LOADING.model, Role.EMBEDDING),
            _model("idle-7b", Role.CHAT),
            _model("broken", Role.CHAT, problem="/models/broken.gguf ends after 4096 of 17 GiB: download it again"),
        ),
        queue_length=3,
        queue_limit=512,
        counters=MappingProxyType(
            {
                READY.model: ModelCounters(3, 1, 0, 42, 5, 1, tokens=TokenCounts(90_000, 12_000, 45.0, 300.0)),
                LOADING.model: ModelCounters(1),
                "was-here-once": ModelCounters(9, tokens=TokenCounts(1, 1)),
            }
        ),
        warnings=("GPU_OVERHEAD is not set",),
        ledger=(
            DeviceLedger("CUDA0", 5 * GIB, 17 * GIB, 0, 0, None, -4096),
            DeviceLedger("CUDA1", 11 * GIB, 0, 0, 2 * GIB, 4 * GIB, 0),
            DeviceLedger("Host", 40 * GIB, GIB + GIB // 2, GIB // 2, 0, None, None),
        ),
    )


def empty_machine() -> Snapshot:
    """Return the first moment of a service that cannot serve yet."""
    return Snapshot(
        version="0.1.0",
        started_at=NOW,
        now=NOW,
        draining=False,
        not_ready=("no llama-server was found: run `make llama`",),
        llama_server=None,
        llama_version=None,
        machine=None,
        runners=(),
        models=(),
        queue_length=0,
        queue_limit=512,
    )
