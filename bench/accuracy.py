"""Measures how near planned bytes come to reserved ones, and writes docs/accuracy.md.

    python bench/accuracy.py [PYTHON]

Three forecasts are held against what llama-server reserves on its devices: the planner's, that of llama.cpp's own
llama-fit-params, and Ollama's formula as ported by the package xllamacpp. PYTHON is an interpreter that can import
xllamacpp and gguf; without it that column stays empty. Small models are really loaded, with RPC workers as devices;
models of published size are asked for by a size-only load (``planner verify``), which this machine has room for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]
sys.path += [str(FOLDER / "fixtures"), str(FOLDER / "tests" / "planner")]

from live_server import explain, reserved  # from the tests: a server that really loads
from published_models import dimensions, write_model
from rpc_worker import start_worker

DOCUMENT = FOLDER / "docs" / "accuracy.md"
TOOLS = Path(sysconfig.get_path("platlib")) / "bin"
MIB = 1024 * 1024
N_CTX = 8192
LAYOUTS = {"one": ("-ngl", "all"), "two": ("-ngl", "all", "-ts", "1,1")}
N_DEVICES = {"one": 1, "two": 2}
LOG_RESOLUTION_BYTES = 0.01 * MIB  # llama-server prints two decimals, of each buffer
COMPONENTS = ("model", "context", "compute")
FORECASTS = ("planner", "llama-fit-params", "Ollama's formula")
FREE = "900GiB"
OLLAMA = """
import functools, importlib.metadata, json, sys
from xllamacpp import memory
reader, types = memory._import_gguf()
read = functools.cache(reader)  # ten seconds for a long vocabulary
memory._import_gguf = lambda: (read, types)
memory.dump_metadata_json = functools.cache(memory.dump_metadata_json)
def components(path, n_devices, n_ctx):
    metadata = memory.dump_metadata_json(read(path, "r"), path)["metadata"]
    kv = sum(memory.graph_size(metadata, n_ctx, 512, 1, "f16")[0])
    gpus = [{"name": "CUDA", "memory_free": 1 << 42, "memory_min": 0} for _ in range(n_devices)]
    told = memory.estimate_gpu_layers(gpus, path, [], n_ctx, 512, 1, "f16")
    compute = told.graph * sum(share > 0 for share in told.tensor_split)
    return {"model": told.vram_size - kv - compute, "context": kv, "compute": compute}
answers = [components(*question) for question in json.load(sys.stdin)]
json.dump({"version": importlib.metadata.version("xllamacpp"), "answers": answers}, sys.stdout)
"""

Bytes = Mapping[str, float]  # by component, all devices together


@dataclass(frozen=True, slots=True)
class Case:
    """One model over one or two devices: what was reserved there, and each forecast of it (None: none was made)."""

    model: str
    layout: str
    loaded: bool
    reserved: Bytes
    forecasts: tuple[Bytes | None, ...]


def environment() -> dict[str, str]:
    """Return this process's environment without settings that would change a plan."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PLANNER_", "OLLAMA_", "LLAMA_"))}
    return kept | {"PLANNER_SCHED_SPREAD": "1", "PLANNER_CACHE_RAM": "0"}


def by_component(figures: Sequence[Mapping[str, Any]], key: str) -> Bytes:
    """Return the sums of this key over all devices but the host."""
    sums = dict.fromkeys(COMPONENTS, 0.0)
    for figure in figures:
        if figure["device"] != "Host":
            sums[figure["component"]] += figure[key]
    return sums


def asked(path: Path, layout: str) -> tuple[Bytes, Bytes]:
    """Return what a size-only load says, and what is planned."""
    devices = [word for i in range(N_DEVICES[layout]) for word in ("--device", f"RPC{i}={FREE}")]
    command = [
        sys.executable,
        "-m",
        "planner",
        "verify",
        str(path),
        *LAYOUTS[layout],
        "-c",
        str(N_CTX),
        *devices,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    (model,) = json.loads(done.stdout)["models"]
    if model["problem"]:
        raise SystemExit(f"{path.name}: {model['problem']}")
    return by_component(model["figures"], "told_bytes"), by_component(model["figures"], "planned_bytes")


def loaded(path: Path, layout: str, endpoints: Sequence[str]) -> tuple[Bytes, Bytes]:
    """Return what a llama-server that really loads reserves, and what is planned."""
    devices = [word for i, one in enumerate(endpoints) for word in ("--device", f"RPC{i}@{one}={FREE}")]
    words = (str(path), *LAYOUTS[layout], "-c", str(N_CTX), *devices, "--no-oracle")
    plan = explain(*words, environment=environment())
    measured = reserved(plan, environment())
    sums = {name: sum(measured.get((one, f"{name}_bytes"), 0.0) for one in endpoints) * MIB for name in COMPONENTS}
    planned = [row for row in plan["devices"] if row["name"] != "Host"]
    return sums, {name: sum(row[f"{name}_bytes"] for row in planned) for name in COMPONENTS}


def fitted(path: Path, layout: str, endpoints: Sequence[str]) -> Bytes:
    """Return what llama-fit-params prints: whole MiB per device."""
    flags = (*LAYOUTS[layout], "-c", str(N_CTX), "-np", "1", "--fit-print", "on")
    command = [str(TOOLS / "llama-fit-params"), "-m", str(path), "--rpc", ",".join(endpoints), *flags]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("RPC")]
    return {name: sum(int(row[1 + i]) for row in rows) * float(MIB) for i, name in enumerate(COMPONENTS)}


def cases(folder: Path, python: str | None) -> Iterator[tuple[Case, str]]:
    """Measure case by case; beside each the version of xllamacpp, empty where it was not asked."""
    models = [(size, name, model) for size in ("small", "full") for name, model in dimensions(size).items()]
    paths = {name: write_model(folder / f"{name}.gguf", model) for _, name, model in models}
    questions = [(size, name, layout) for size, name, _ in models for layout in LAYOUTS]
    told: dict[str, Any] = {"version": "", "answers": [None] * len(questions)}
    if python:
        asked_of = [(str(paths[name]), N_DEVICES[layout], N_CTX) for _, name, layout in questions]
        answer = subprocess.run(
            [python, "-c", OLLAMA], input=json.dumps(asked_of), stdout=subprocess.PIPE, text=True, check=True
        )
        told = json.loads(answer.stdout)
    with ExitStack() as stack:
        workers = [start_worker(TOOLS) for _ in range(2)]
        for worker in workers:
            stack.callback(worker.stop)
        for (size, name, layout), ollama in zip(questions, told["answers"], strict=True):
            endpoints = [worker.endpoint for worker in workers[: N_DEVICES[layout]]]
            fit = fitted(paths[name], layout, endpoints)
            real = size == "small"
            truth, ours = loaded(paths[name], layout, endpoints) if real else asked(paths[name], layout)
            print(f"{name}, {layout}", flush=True)
            yield Case(name, layout, real, truth, (ours, fit, ollama)), told["version"]


# ---------------------------------------------------------------------------------------------------------------------
# The document


def errors(case: Case, component: str) -> list[float | None]:
    """Return each forecast's error as a share of what was reserved; ``total`` is all components together."""
    parts = COMPONENTS if component == "total" else (component,)
    truth = sum(case.reserved[part] for part in parts)
    blur = LOG_RESOLUTION_BYTES * len(parts) * N_DEVICES[case.layout] if case.loaded else 0

    def error(forecast: Bytes) -> float:
        difference = sum(forecast[part] for part in parts) - truth
        return difference / truth if abs(difference) > blur else 0.0

    return [None if forecast is None else error(forecast) for forecast in case.forecasts]


def percent(share: float | None) -> str:
    """Return an error for the table."""
    if share is None:
        return ""
    return f"{share:+.2%}".replace("%", " %") if share else "0"


def document(measured: Sequence[Case], version: str) -> str:
    """Return the document."""
    package = f"xllamacpp {version}" if version else "xllamacpp, which was not at hand: its column is empty"
    lines = [
        "# How near the planned bytes come",
        "",
        "Written by `python bench/accuracy.py [PYTHON]`; every number was measured by that command.",
        "",
        f"Each model is placed on one device and, halved, on two, with a context of {N_CTX:,} tokens, one slot, f16",
        "caches and no layer on the host. Errors are shares of what llama-server reserves on all devices together.",
        (
            "`0` is no error at all, or none that its log shows (hundredths of a MiB). "
            "The driver's own memory is left out."
        ),
        "",
        "- planner: `planner explain --no-oracle`, formulas and replay alone.",
        "- llama-fit-params: llama.cpp's own estimate of the same build, whole MiB. It reckons with logits for a whole",
        "  batch, which llama-server does not keep, and drops the devices that norms are pinned to.",
        f"- Ollama's formula: {package}, without its constant minimum per GPU.",
        "  Its weights count the first layer once more on each GPU, and the embeddings, which stay on the host;",
        "  its compute is that of attention without flash attention.",
        "",
        "## All cases",
        "",
        f"| component | {' | '.join(f'{name}: mean, worst' for name in FORECASTS)} |",
        "|---|" + "---|" * len(FORECASTS),
    ]
    for component in (*COMPONENTS, "total"):
        columns = zip(*(errors(case, component) for case in measured), strict=True)
        lines.append(f"| {component} | {' | '.join(_summary(column) for column in columns)} |")
    for title, real in (("Really loaded, on RPC workers", True), ("Published sizes, by a size-only load", False)):
        lines += ["", f"## {title}", "", f"| model | devices | component | reserved, MiB | {' | '.join(FORECASTS)} |"]
        lines.append("|---|---|---|---|" + "---|" * len(FORECASTS))
        lines += [row for case in measured if case.loaded == real for row in _rows(case)]
    return "\n".join(lines) + "\n"


def _summary(column: Sequence[float | None]) -> str:
    known = [abs(share) for share in column if share is not None]
    if not known:
        return ""
    mean, worst = percent(sum(known) / len(known)), percent(max(known))
    return f"{mean}, {worst}".replace("+", "")


def _rows(case: Case) -> Iterator[str]:
    for component in COMPONENTS:
        cells = (f"{case.reserved[component] / MIB:,.2f}", *map(percent, errors(case, component)))
        yield f"| {case.model} | {case.layout} | {component} | {' | '.join(cells)} |"


def main() -> int:
    """Measure everything and write the document."""
    python = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        found = list(cases(Path(folder), python))
    DOCUMENT.write_text(document([case for case, _ in found], found[0][1]), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
