"""Plans as values, for tests that need one but not what is in it."""

from __future__ import annotations

from planner.types import (
    HOST,
    Device,
    DeviceKind,
    DeviceName,
    DeviceUsage,
    Figure,
    HostDetail,
    LaunchSpec,
    LlamaBuild,
    ModelSummary,
    Placement,
    Plan,
    PlanRequest,
    PoolId,
    Source,
)
from supervisor.core.types import LoadPlan

MODEL = ModelSummary("/m.gguf", "m", "llama", "F16", 10, 10, 10, 2, 4096)
GPU = Device(DeviceName("CUDA0"), DeviceKind.CUDA, 100, 100, PoolId("CUDA0"))


def make_plan(*, layers: int = 3, n_parallel: int = 1, size_bytes: int = 10, fit_by_llama: bool = False) -> LoadPlan:
    """Return a plan that puts so many of three layers, the output among them, on the one GPU."""
    figure = Figure(size_bytes, Source.EXACT)
    on_gpu = DeviceUsage(GPU.name, GPU.kind, 100, 100, 100, model=figure)
    on_host = DeviceUsage(HOST, DeviceKind.HOST, 100, 100, 100)
    where = [0 if rank < layers else -1 for rank in range(3)]
    plan = Plan(
        model=MODEL,
        request=PlanRequest(n_parallel=n_parallel),
        build=LlamaBuild("/llama-server", None, None),
        placement=Placement(("CUDA0",), (where[0], where[1]), where[2], layers, (1.0,)),
        usages=(on_gpu, on_host),
        host=HostDetail(),
        n_ctx_per_slot=4096,
        launch=LaunchSpec(("/llama-server",)),
        fit_by_llama=fit_by_llama,
    )
    return LoadPlan(plan, {})
