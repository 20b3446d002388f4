"""A model with eyes on a worker that is hardly large enough for both: the eyes go to the host, and it sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import companion_models
import pytest
import tiny_models
from rpc_worker import RpcWorker
from running_service import Serve

from planner.units import MIB

pytestmark = pytest.mark.llama

ONE_PIXEL = (  # a PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize("declared_mib, argument", [(14, "--no-mmproj-offload"), (200, "--mmproj-offload")])
def test_a_model_whose_projector_leaves_it_no_room_lies_on_the_device_and_sees(
    serve: Serve, tmp_path: Path, rpc_workers: Callable[[int], tuple[RpcWorker, ...]], declared_mib: int, argument: str
) -> None:
    """What the worker then holds is within what it was said to have, and the image is answered."""
    folder = tmp_path / "models"
    folder.mkdir()
    tiny_models.write_chat_model(folder / "eyes.gguf")
    companion_models.write_projector(folder / "mmproj-eyes.gguf", kind="qwen2vl_merger", n_embd_text=64)
    (worker,) = rpc_workers(1)
    service = serve(PLANNER_MODELS=str(folder), PLANNER_RPC_SERVERS=f"{worker.endpoint}={declared_mib * MIB}")
    content = [
        {"type": "text", "text": "hello"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ONE_PIXEL}"}},
    ]
    answer = service.chat("eyes", messages=[{"role": "user", "content": content}], max_tokens=2)
    assert answer.status == 200, answer.read()
    answer.read()
    runner = service.runner()
    held = {one["name"]: one["held_bytes"] for one in service.get("/status")["devices"]}
    assert 0 < held["RPC0"] <= declared_mib * MIB
    assert argument in runner["plan"]["launch"]["argv"]
