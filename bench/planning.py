"""Times planning: inside one process the evaluation of placements, and as whole process beside llama.cpp's own fit.

    python bench/planning.py [RUNS]

Inside, a model of 80 layers and one with experts lie on eight devices. "another split" is what a search does for each
candidate: tables by layer are kept, the graph is replayed; "the same again" is a placement that was tried before.
Whole searches are those of machines with eight unequal cards, from one that holds everything to one that holds a part,
with a context that is pinned and one that is free; and of twenty models on one machine.
Prints medians and what they are to stay below; asserts nothing.
"""

from __future__ import annotations

import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

FOLDER = Path(__file__).parents[1]
sys.path += [str(FOLDER), str(FOLDER / "fixtures")]

from explain import run  # beside this file
from published_models import dimensions, write_model

from planner.accounting import MemoryLedger, account
from planner.build import PINNED_BUILD
from planner.context import context_params
from planner.layers import layer_devices
from planner.model import ModelFacts, read_model
from planner.search.placement import search
from planner.types import (
    HOST,
    HOST_POOL,
    Device,
    DeviceKind,
    DeviceName,
    Machine,
    Placement,
    PlanRequest,
    Policy,
    PoolId,
)

RUNS = 9
MODELS = ("llama-3-70b", "qwen3-30b-a3b")
N_DEVICES = 8
N_MODELS = 20
N_CTX = 8192
RUNNER_BYTES = 1 << 30  # what a runner takes of each card beside the model
FREE_BYTES = 80 << 30
KEPT_MS = 30  # for one evaluation with kept tables, a dense model of 80 layers on eight devices
WHOLE_MS = 150  # for the first one, everything anew
SEARCH_MS = {"llama-3-70b": 150, "qwen2.5-72b": 150, "deepseek-v3": 400}  # for one search on eight cards
TWENTY_MS = 2000  # for a search for each of twenty models
# GiB and GB/s of eight unequal cards; a machine has them in one of these sizes, as a share of the model's.
UNEQUAL = ((24, 936), (12, 360), (16, 717), (8, 448), (24, 1008), (11, 616), (32, 1792), (48, 696))
SHARES = (2.0, 1.15, 0.6, 0.3)
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


def milliseconds(action: Callable[[], object]) -> float:
    """Return how long this takes, as the processor's time: nothing is waited for."""
    start = time.process_time()
    action()
    return (time.process_time() - start) * 1000


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


def unequal(model: ModelFacts, share: float) -> Machine:
    """Return a machine of eight unequal cards that together have this share of the model's size."""
    scale = share * model.summary.tensor_bytes / sum(size for size, _ in UNEQUAL)
    cards = enumerate(UNEQUAL)
    return replace(
        MACHINE,
        devices=tuple(
            replace(
                MACHINE.devices[i],
                total_bytes=int(size * scale) + RUNNER_BYTES,
                free_bytes=int(size * scale) + RUNNER_BYTES,
                bandwidth_bytes_per_s=speed * 10**9,
            )
            for i, (size, speed) in cards
        ),
    )


def searching(path: Path, runs: int) -> Iterator[tuple[float, str, float]]:
    """Yield the machine's share of the model, the context, and the median milliseconds of a search, nothing kept."""
    for share in SHARES:
        for n_ctx in (N_CTX, "auto"):
            model = read_model(str(path))
            machine = unequal(model, share)
            request = PlanRequest(n_ctx=n_ctx)
            times = [searched(model, request, machine) for _ in range(runs)]
            yield share, str(n_ctx), statistics.median(times)


def searched(model: ModelFacts, request: PlanRequest, machine: Machine) -> float:
    """Return how long one search takes that has nothing kept from others."""
    forget()
    return milliseconds(lambda: search(model, request, machine, Policy(), PINNED_BUILD))


def forget() -> None:
    """Empty every table that planning keeps."""
    for name, module in list(sys.modules.items()):
        if name.startswith("planner."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


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
        described = {**dimensions("full"), **dimensions("large")}
        for name, below_ms in SEARCH_MS.items():
            path = write_model(Path(folder) / f"{name}.gguf", described[name], vocabulary=False)
            print(f"{name}, a search on {N_DEVICES} unequal cards, to stay below {below_ms} ms")
            for share, n_ctx, taken_ms in searching(path, max(runs // 3, 1)):
                judged = "" if taken_ms <= below_ms else ", too long"
                print(f"  cards of {share:.0%} of its size, context {n_ctx}: {taken_ms:.0f} ms{judged}")
        twenty = [
            read_model(str(write_model(Path(folder) / f"{i}.gguf", each, vocabulary=False)))
            for i, each in zip(range(N_MODELS), cycle(described.values()), strict=False)
        ]
        forget()
        taken_ms = milliseconds(
            lambda: [search(each, PlanRequest(), MACHINE, Policy(), PINNED_BUILD) for each in twenty]
        )
        print(f"{N_MODELS} models, one search for each on {N_DEVICES} cards: {taken_ms:.0f} ms (below {TWENTY_MS})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
