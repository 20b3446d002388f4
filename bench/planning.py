"""Times planning: inside one process the evaluation of placements, and as whole process beside llama.cpp's own fit.

    python bench/planning.py [RUNS]

Inside, a model of 80 layers and one with experts lie on eight devices. "another split" is what a search does for each
candidate: tables by layer are kept, the graph is replayed; "the same again" is a placement that was tried before.
Prints medians and what they are to stay below; asserts nothing.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1]
sys.path += [str(FOLDER), str(FOLDER / "fixtures")]

from explain import run  # noqa: E402 - beside this file
from published_models import dimensions, write_model  # noqa: E402

from planner.accounting import MemoryLedger, account  # noqa: E402
from planner.build import PINNED_BUILD  # noqa: E402
from planner.context import context_params  # noqa: E402
from planner.layers import layer_devices  # noqa: E402
from planner.model import ModelFacts, read_model  # noqa: E402
from planner.types import (  # noqa: E402
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    Placement,
    PlanRequest,
    PoolId,
)

RUNS = 9
MODELS = ("llama-3-70b", "qwen3-30b-a3b")
N_DEVICES = 8
FREE_BYTES = 80 << 30
KEPT_MS = 30  # for one evaluation with kept tables, a dense model of 80 layers on eight devices
WHOLE_MS = 150  # for the first one, everything anew
MACHINE = Machine(
    tuple(
        Device(DeviceName(f"CUDA{i}"), DeviceKind.CUDA, FREE_BYTES, FREE_BYTES, PoolId(f"card{i}"))
        for i in range(N_DEVICES)
    ),
    Device(HOST, DeviceKind.HOST, FREE_BYTES, FREE_BYTES, HOST_POOL),
)


def splits(n_layer: int) -> Iterator[Placement]:
    """Yield placements of all layers on eight devices, no two alike."""
    names = tuple(str(device.name) for device in MACHINE.devices)
    for first in range(1, n_layer):
        shares = (float(first), *([float(n_layer)] * (N_DEVICES - 1)))
        where, output = layer_devices(n_layer, n_layer + 1, shares)
        yield Placement(names, where, output, n_layer + 1, shares)


def milliseconds(action: Callable[[], MemoryLedger]) -> float:
    """Return how long one evaluation takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1000


def inside(model: ModelFacts, runs: int) -> tuple[float, float, float]:
    """Return the milliseconds of the first evaluation, and the medians of another split and of the same again."""
    params = context_params(model, PlanRequest(n_ctx=8192))
    candidates = splits(model.hparams.n_layer_all)

    def evaluation(placement: Placement) -> Callable[[], MemoryLedger]:
        return lambda: account(model, params, placement, MACHINE, PINNED_BUILD)

    first = milliseconds(evaluation(next(candidates)))
    tried = [evaluation(next(candidates)) for _ in range(runs)]
    others = [milliseconds(one) for one in tried]
    again = [milliseconds(one) for one in tried]
    return first, statistics.median(others), statistics.median(again)


def whole(model: Path, runs: int) -> tuple[float, float]:
    """Return the median seconds of ``planner explain`` and of llama-fit-params, run in turn."""
    tools = Path(sysconfig.get_path("platlib")) / "bin"
    ours = [sys.executable, "-m", "planner", "explain", str(model), "--json", "--host-memory", "64GiB"]
    theirs = [str(tools / "llama-fit-params"), "-m", str(model), "--fit-print", "on"]
    run(ours)  # the first run writes bytecode and remembers llama-server's answers
    pairs = [(run(ours)[0], run(theirs)[0]) for _ in range(runs)]
    return statistics.median(ours_s for ours_s, _ in pairs), statistics.median(theirs_s for _, theirs_s in pairs)


def main() -> int:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = write_model(Path(folder) / f"{name}.gguf", dimensions("full")[name])
            first, other, again = inside(read_model(str(path)), runs)
            our_s, their_s = whole(path, runs)
            print(name)
            print(f"  inside, on {N_DEVICES} devices: the first evaluation {first:.0f} ms (below {WHOLE_MS}), ", end="")
            print(f"another split {other:.0f} ms (below {KEPT_MS}), the same again {again:.1f} ms")
            print(f"  whole process: planner explain {our_s:.3f} s, llama-fit-params {their_s:.3f} s, ", end="")
            print(f"ratio {our_s / their_s:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
