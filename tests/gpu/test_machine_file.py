"""A machine written by ``planner devices --json`` and read back to plan for it elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu import machine_file, show, whatif
from planner.types import Device, DeviceKind, DeviceName, Machine, MemoryPool, PoolId

GIB = 1024**3

SIZES = st.none() | st.integers(0, 2**50)
KINDS = st.sampled_from([kind for kind in DeviceKind if kind is not DeviceKind.HOST])


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Draw a machine of up to four devices in up to three pools."""
    pools = [MemoryPool(PoolId(f"pool{n}"), draw(SIZES), draw(SIZES)) for n in range(3)]
    totals = [draw(SIZES) for _ in range(draw(st.integers(0, 4)))]
    devices = tuple(
        Device(
            name=DeviceName(f"D{number}"),
            kind=draw(KINDS),
            total_bytes=total,
            free_bytes=draw(SIZES if total is None else st.none() | st.integers(0, total)),
            pool=draw(st.sampled_from(pools)).id,
            description=draw(st.text(max_size=5)),
            uuid=draw(st.none() | st.just("GPU-1")),
            bandwidth_bytes_per_s=draw(SIZES),
            compute_capability=draw(st.none() | st.just("8.9")),
            endpoint=draw(st.none() | st.just("h:1")),
            alignment_bytes=draw(st.none() | st.just(128)),
            overhead_bytes=draw(SIZES),
            usable=draw(st.booleans()),
            why_not=draw(st.none() | st.just("because")),
        )
        for number, total in enumerate(totals)
    )
    base = whatif.machine(host_memory_bytes=GIB)
    return replace(base, devices=devices, pools=(*base.pools, *pools))


@given(machine=machines())
def test_what_was_written_is_what_is_read(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "machine.json"
    file.write_text(json.dumps(show.as_json(machine)))
    assert machine_file.read(str(file)) == machine


def document() -> dict[str, Any]:
    """Return a machine with one card, as it is written."""
    return show.as_json(whatif.machine(["CUDA0=8GiB"], host_memory_bytes=GIB))


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda d: d["devices"].pop(), "0 devices of the kind host"),
        (lambda d: d["devices"][0].pop("name"), "devices[0]: name is missing"),
        (lambda d: d["devices"][0].pop("free_bytes"), "devices[0]: free_bytes is missing"),
        (lambda d: d["devices"][0].update(free_bytes="8G"), "devices[0]: free_bytes is '8G'"),
        (lambda d: d["devices"][0].update(free_bytes=-1), "free_bytes is -1"),
        (lambda d: d["devices"][0].update(free_bytes=True), "free_bytes is True"),
        (lambda d: d["devices"][0].update(kind="tpu"), "kind 'tpu' is none of cuda"),
        (lambda d: d["devices"][0].update(name=["CUDA0"]), "where a text belongs"),
        (lambda d: d["devices"][0].update(name="CUDA0,CUDA1"), "'CUDA0,CUDA1' is no name"),
        (lambda d: d["devices"][0].update(name=""), "'' is no name"),
        (
            lambda d: d["devices"][-1].update(name="X"),
            "'X' is no name that llama-server gives a device of the kind host",
        ),
        (lambda d: d["devices"][0].update(free_bytes=1 << 50), "free_bytes is more than total_bytes"),
        (lambda d: d["devices"].append(d["devices"][0]), "CUDA0 is there twice"),
        (lambda d: d["devices"].append(7), "devices[2]: not an object"),
        (lambda d: d.update(pools=[{"id": 3}]), "pools[0]: id is 3"),
        (lambda d: d.update(devices={}), "not a machine"),
    ],
)
def test_a_field_that_is_wrong_is_named_in_one_line(tmp_path: Path, change: Any, says: str) -> None:
    broken = document()
    change(broken)
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(whatif.WhatIfError) as caught:
        machine_file.read(str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b" " * (2 << 20)])
def test_a_file_that_is_no_machine_is_one_line_with_the_command_that_writes_one(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "machine.json"
    file.write_bytes(data)
    with pytest.raises(whatif.WhatIfError, match="planner devices --json >"):
        machine_file.read(str(file))


def test_a_file_that_is_not_there_is_said_to_be_unreadable(tmp_path: Path) -> None:
    with pytest.raises(whatif.WhatIfError, match="No such file"):
        machine_file.read(str(tmp_path / "none"))


@pytest.mark.llama
def test_a_model_is_planned_for_the_machine_of_a_file(
    chat_model: Path, free_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "machine.json").write_text(json.dumps(document()))

    def explain(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planner", "explain", str(chat_model), "--json", *words]
        return subprocess.run(command, env=free_environment, capture_output=True, text=True, timeout=60, check=False)

    from_file = explain("--machine", str(tmp_path / "machine.json"))
    named = explain("--device", "CUDA0=8GiB", "--host-memory", "1GiB")
    assert (from_file.returncode, from_file.stderr) == (0, "")
    assert json.loads(from_file.stdout)["devices"] == json.loads(named.stdout)["devices"]
    wrong = explain("--machine", str(tmp_path / "none.json"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    both = explain("--machine", str(tmp_path / "machine.json"), "--gpu", "rtx4090")
    assert "--machine and --gpu rtx4090" in both.stderr
