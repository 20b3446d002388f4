"""Records what a machine's GPUs really take beside what a plan says: the basis of the overheads in ``gpu/card.py``.

    python bench/gpu_measurements.py [--out docs/measurements/NAME] [--workers N]

For each NVIDIA card: NVML's figures beside cudaMemGetInfo's, and the cost of a bare context. For each of four generated
models, two contexts, and one and several devices (``GGML_CUDA_DEVICES``): the plan, the buffers that llama-server's log
reports, and what NVML says that its process holds. Writes NAME.json and NAME.md. Needs llama-server for CUDA
(``make llama BACKEND=cuda``). ``--workers N`` takes N ``ggml-rpc-server`` on this machine for GPUs: a trial of the
script itself where there is none.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "fixtures")]

import tiny_models  # of the folder just added
from rpc_worker import start_worker

from gpu import nvml
from planner.types import HOST
from supervisor.core import loglines
from supervisor.core.loglines import BufferKind, BufferSize, Listening

MODELS: Mapping[str, Mapping[str, Any]] = {
    "4 layers of 64, F16": {},
    "8 layers of 256, F16": {"n_layer": 8, "n_embd": 256, "n_ff": 768},
    "12 layers of 512, Q8_0": {"n_layer": 12, "n_embd": 512, "n_ff": 1536, "layer_types": ("Q8_0",)},
    "6 layers of 1024, F16 and Q4_0": {"n_layer": 6, "n_embd": 1024, "n_ff": 3072, "layer_types": ("F16", "Q4_0")},
}
CONTEXTS = (2048, 32768)
VIRTUAL_DEVICES = (1, 2, 4)
MIB = 1024 * 1024


def bare_context() -> dict[str, Any]:
    """Return, for each CUDA device, what cudaMemGetInfo says and what NVML says a process with a bare context holds."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return {"missing": str(error), "devices": []}
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return {"missing": "the CUDA driver finds no device", "devices": []}
    found = []
    for index in range(count.value):
        context, device = ctypes.c_void_p(), ctypes.c_int()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        name = ctypes.create_string_buffer(20)
        cuda.cuDeviceGetPCIBusId(name, len(name), device)
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        cuda.cuCtxSetCurrent(context)
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        pci = name.value.decode().lower()
        held = held_by(os.getpid()).get(pci)
        found.append({"pci": pci, "free_bytes": free.value, "total_bytes": total.value, "context_bytes": held})
    return {"missing": None, "devices": found}


def held_by(pid: int) -> dict[str, int | None]:
    """Return what NVML says that this process holds, by the card's address."""
    return {
        card.pci_bus_id or card.name: use.used_bytes
        for card in nvml.probe().cards
        for use in card.processes
        if use.pid == pid
    }


def cards() -> list[dict[str, Any]]:
    """Return NVML's figures of every card."""
    return [
        {
            "pci": card.pci_bus_id,
            "name": card.name,
            "arch": card.arch,
            "multiprocessors": card.multiprocessors,
            "driver": card.driver,
            "total_bytes": card.total_bytes,
            "free_bytes": card.free_bytes,
            "reserved_bytes": card.reserved_bytes,
        }
        for card in nvml.probe().cards
    ]


def planned(model: Path, n_ctx: int, environ: Mapping[str, str], devices: Sequence[str]) -> dict[str, Any]:
    """Return what ``planner explain --json`` says. Raises RuntimeError with its error line."""
    command = [sys.executable, "-m", "planner", "explain", str(model), "-c", str(n_ctx), "-ngl", "all", "--json"]
    command += ["--device", ",".join(devices), "-ts", ",".join("1" * len(devices))] if devices else []
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False, cwd=ROOT)
    if not done.stdout:
        raise RuntimeError(done.stderr.strip())
    plan: dict[str, Any] = json.loads(done.stdout)
    if plan["launch"] is None:
        raise RuntimeError(plan["headline"])
    return plan


@contextmanager
def loaded(plan: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield the process id of a llama-server that runs this plan, and its buffers by llama.cpp's names for them."""
    argv = [*plan["launch"]["argv"], "--host", "127.0.0.1", "--port", "0", "--no-webui"]
    with tempfile.TemporaryDirectory() as empty:
        env = {**environ, **plan["launch"]["env"], "XDG_CONFIG_HOME": empty, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        child = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            yield child.pid, buffers(child)
        finally:
            child.kill()  # it waits for clients otherwise, and has nothing to lose
            child.communicate()


def buffers(child: subprocess.Popen[str]) -> dict[str, int]:
    """Return the sums of the buffers that the log reports until the server listens. Raises RuntimeError if it ends."""
    sums: Counter[str] = Counter()
    last = ""
    for line in child.stdout or ():
        fact = loglines.read(line.rstrip("\n"))
        last = line.strip() or last
        if isinstance(fact, BufferSize) and fact.kind is not BufferKind.OUTPUT:
            sums[loglines.device_of(fact.buffer, {})] += fact.size_bytes
        elif isinstance(fact, Listening):
            return dict(sums)
    raise RuntimeError(f"llama-server ended: {last}")


def row(model: Path, n_ctx: int, environ: Mapping[str, str], devices: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each device of a run: planned, reported by llama-server, held according to NVML."""
    plan = planned(model, n_ctx, environ, devices)
    used = [device for device in plan["devices"] if device["planned_bytes"] and device["name"] != HOST]
    with loaded(plan, environ) as (pid, reported):
        held = held_by(pid)
    # The log's names count within the runner, in the order of the plan; a worker's carry its address.
    measured = [size for name, size in sorted(reported.items()) if name != HOST]
    by_worker = re.findall(r"--rpc (\S+)", " ".join(plan["launch"]["argv"]))
    if by_worker:
        measured = [reported[f"RPC0[{endpoint}]"] for endpoint in by_worker[0].split(",")]
    return [
        {
            "device": device["name"],
            "planned_buffers_bytes": device["planned_bytes"] - device["overhead_bytes"],
            "planned_overhead_bytes": device["overhead_bytes"],
            "reported_bytes": measured[rank] if rank < len(measured) else None,
            "held_bytes": sum(size or 0 for size in held.values()) if held else None,
        }
        for rank, device in enumerate(used)
    ]


def measure(workers: int, models: Sequence[str], contexts: Sequence[int]) -> dict[str, Any]:
    """Return everything that is recorded."""
    tools = Path(sysconfig.get_path("platlib")) / "bin"
    document: dict[str, Any] = {"cards": cards(), "contexts": child_contexts(), "stand_ins": workers, "runs": []}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PLANNER_", "OLLAMA_"))}
        started = [start_worker(tools) for _ in range(workers)]
        for worker in started:
            stack.callback(worker.stop)
        if workers:
            environ["PLANNER_RPC_SERVERS"] = ",".join(f"{worker.endpoint}=4GiB" for worker in started)
        for name in models:
            path = Path(folder) / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.gguf"
            tiny_models.write_chat_model(path, n_ctx_train=max(CONTEXTS), **MODELS[name])
            for n_ctx in contexts:
                for count in (workers,) if workers else VIRTUAL_DEVICES:
                    prefix = "RPC" if workers else "CUDA"
                    virtual = {} if workers or count == 1 else {"GGML_CUDA_DEVICES": str(count)}
                    devices = [f"{prefix}{number}" for number in range(count)]
                    run = {"model": name, "n_ctx": n_ctx, "n_devices": count}
                    try:
                        run["devices"] = row(path, n_ctx, environ | virtual, devices)
                    except RuntimeError as error:
                        run["failed"] = str(error)
                    document["runs"].append(run)
            path.unlink()
    return document


def child_contexts() -> dict[str, Any]:
    """Return ``bare_context`` of a process of its own: its context ends with it."""
    code = "import gpu_measurements, json; print(json.dumps(gpu_measurements.bare_context()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"missing": done.stderr[-200:]}
    return answer


def as_markdown(document: Mapping[str, Any]) -> str:
    """Return the record as tables, in MiB."""
    lines = [
        "# Measured",
        "",
        "In MiB. `bench/gpu_measurements.py` made this; the same figures in bytes lie beside it.",
        "",
    ]
    if document["stand_ins"]:
        lines += [f"**A trial without a GPU: {document['stand_ins']} `ggml-rpc-server` on the CPU stood in.**", ""]
    if missing := document["contexts"]["missing"]:
        lines += [f"No CUDA: {missing}", ""]
    lines += [
        "| card | NVML total | free | reserved | CUDA total | CUDA free | bare context |",
        "|---|---|---|---|---|---|---|",
    ]
    by_pci = {device["pci"]: device for device in document["contexts"].get("devices", ())}
    for card in document["cards"]:
        cuda = by_pci.get(card["pci"], {})
        figures = [card["total_bytes"], card["free_bytes"], card["reserved_bytes"]]
        figures += [cuda.get(key) for key in ("total_bytes", "free_bytes", "context_bytes")]
        lines.append(f"| {card['name']} | {' | '.join(map(mib, figures))} |")
    head = (
        "| model | context | device | planned buffers | llama-server reports | planned overhead | NVML, whole process |"
    )
    lines += ["", head, "|---|---|---|---|---|---|---|"]
    for run in document["runs"]:
        about = f"| {run['model']} | {run['n_ctx']} |"
        for each in run.get("devices", ()):
            keys = ("planned_buffers_bytes", "reported_bytes", "planned_overhead_bytes", "held_bytes")
            lines.append(
                f"{about} {each['device']} of {run['n_devices']} | {' | '.join(mib(each[key]) for key in keys)} |"
            )
        if "failed" in run:
            lines.append(f"{about} of {run['n_devices']} | {run['failed']} | | | |")
    return "\n".join(lines) + "\n"


def mib(size_bytes: int | None) -> str:
    """Return a size in MiB, unknown as a question mark."""
    return "?" if size_bytes is None else f"{size_bytes / MIB:.2f}"


def main() -> int:
    """Measure and write; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measurements/gpu", help="without suffix")
    parser.add_argument("--workers", type=int, default=0, help="RPC workers on this machine instead of GPUs")
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many of the models, smallest first")
    arguments = parser.parse_args()
    if not arguments.workers and not nvml.probe().cards:
        sys.stderr.write("no NVIDIA card here (planner doctor says why); --workers 2 tries the script without one\n")
        return 1
    document = measure(arguments.workers, list(MODELS)[: arguments.models], CONTEXTS)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(as_markdown(document))
    failed = [run for run in document["runs"] if "failed" in run]
    for run in failed:
        sys.stderr.write(f"{run['model']}, context {run['n_ctx']}, {run['n_devices']} devices: {run['failed']}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
