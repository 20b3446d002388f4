"""What a large image takes beyond what a projector has when its server starts: kept free, and really taken."""

from __future__ import annotations

import base64
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import companion_models
import pytest
from machines import machine_of
from rpc_worker import start_worker

from planner import companions
from planner.build import PINNED_BUILD
from planner.companions import projector
from planner.model import read_attachment, read_model
from planner.search.placement import search
from planner.types import DeviceKind, Machine, Plan, PlanRequest, Policy

WITHIN_S = 60.0
ALLOCATED = re.compile(r"\[alloc_buffer\] .*?size: (\d+) ->")
LISTENS = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
MOST_PIXELS = 448  # a side, of what pixtral takes: 32 patches a side are 1,024 tokens


def machine(free_bytes: int) -> Machine:
    """Return a machine with one device of that size."""
    whole = machine_of(DeviceKind.RPC, 1)
    return replace(whole, devices=(replace(whole.devices[0], free_bytes=free_bytes),))


def planned(model: Path, eyes: Path, free_bytes: int, **knobs: object) -> Plan:
    request = PlanRequest(n_ctx=8192, mmproj=str(eyes), **knobs)  # type: ignore[arg-type]
    facts = companions.attach(read_model(str(model)), request)
    plan = search(facts, request, machine(free_bytes), Policy(), PINNED_BUILD)
    assert isinstance(plan, Plan)
    return plan


def picture(side: int) -> bytes:
    """Return a black square as PNG."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (side + 1)))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def test_what_a_large_image_takes_is_kept_free_beside_what_is_planned(endless_model: Path, tmp_path: Path) -> None:
    """It is no part of what is planned, it is held against the budget, and the reader learns of it."""
    eyes = tmp_path / "mmproj.gguf"
    companion_models.write_projector(eyes, kind="qwen2vl_merger")
    plan = planned(endless_model, eyes, 1 << 30, n_gpu_layers="all", n_ubatch=512, mmproj_offload=True)
    device = plan.usages[0]
    reserve = device.image_reserve_bytes
    assert reserve > 0
    assert (device.planned_bytes or 0) + reserve == device.claimed_bytes
    assert "RPC0" in {each.step: each.chosen for each in plan.decisions}["kept free for a large image"]
    exact, less = (planned(endless_model, eyes, device.claimed_bytes - each).usages[0] for each in (0, 1))
    assert (exact.claimed_bytes, exact.headroom_bytes) == (device.claimed_bytes, 0)
    assert less.claimed_bytes < device.claimed_bytes, "something else had to give way"


def test_who_limits_images_keeps_less_free_for_them(endless_model: Path, tmp_path: Path) -> None:
    eyes = tmp_path / "mmproj.gguf"
    companion_models.write_projector(eyes, kind="qwen2vl_merger")
    kept = {
        limit: planned(endless_model, eyes, 1 << 30, passthrough=(flag, limit)).usages[0].image_reserve_bytes
        for flag, limit in (("--image-max-tokens", limit) for limit in ("0", "2116", "3000", "5000"))
    }
    unlimited = planned(endless_model, eyes, 1 << 30).usages[0].image_reserve_bytes
    assert 0 == kept["2116"] < kept["3000"] < unlimited == kept["0"] < kept["5000"]


@pytest.mark.llama
def test_an_image_of_many_tokens_takes_no_more_than_is_kept_free(
    endless_model: Path, tmp_path: Path, llama_tools: Path, free_environment: dict[str, str]
) -> None:
    eyes = tmp_path / "mmproj.gguf"
    companion_models.write_projector(eyes, kind="pixtral")
    encoder = read_attachment(str(eyes))
    charge = projector.charge(
        encoder, machine(1 << 30).devices[0], PINNED_BUILD, projector.image_tokens(encoder)
    ).devices["RPC0"]

    worker = start_worker(llama_tools, talks=True)
    lines: list[str] = []
    reader = Thread(target=lambda: lines.extend(worker.process.stdout or ()))
    reader.start()
    words = ["-m", str(endless_model), "--mmproj", str(eyes), "--rpc", worker.endpoint, "-c", "2048", "--port", "0"]
    try:
        with serving([str(llama_tools / "llama-server"), *words], free_environment) as port:
            ask(port, picture(32))
            ask(port, picture(MOST_PIXELS))
    finally:
        worker.stop()
        reader.join()
    *_, at_load, with_image = (int(found[1]) for line in lines if (found := ALLOCATED.search(line)))
    assert charge.compute.bytes is not None
    assert 0 < at_load <= charge.compute.bytes < with_image <= charge.compute.bytes + charge.image_reserve_bytes


@contextmanager
def serving(command: list[str], environment: dict[str, str]) -> Iterator[int]:
    """Run a llama-server and yield its port once it listens."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as it:
        assert it.stderr is not None
        port = next(int(found[1]) for line in it.stderr if (found := LISTENS.search(line)))
        rest = Thread(target=it.stderr.read)
        rest.start()
        try:
            yield port
        finally:
            it.terminate()
            it.wait()
            rest.join()


def ask(port: int, png: bytes) -> None:
    """Have the model look at an image."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    content = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    with closing(HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
