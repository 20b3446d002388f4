"""What an odd llama-server lists is read as far as it makes sense; where it makes none, that is one phrase."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from fake_server import environ_in, write_script, write_server
from file_trees import host_tree

from gpu import host, llama
from gpu.card import Card, Vendor
from gpu.detect import detect
from gpu.llama import parse_list
from gpu.matching import match
from planner.types import HOST_POOL

MIB = 1024**2
SHORT_S = 0.3  # for what never answers


@pytest.mark.parametrize(
    "line,expected",
    [
        ("  CUDA0: A card (12 GB) (rev. 2) (100 MiB, 50 MiB free)", ("CUDA0", "A card (12 GB) (rev. 2)", 100, 50)),
        ("  Foo0: A backend of tomorrow (100 MiB, 50 MiB free)", ("Foo0", "A backend of tomorrow", 100, 50)),
        ("\tCUDA0: x (100 MiB, 0 MiB free)   ", ("CUDA0", "x", 100, 0)),
        ("  CUDA0: x (100 MiB, 200 MiB free)", ("CUDA0", "x", 100, 100)),
        ("  CUDA0: x (0 MiB, 0 MiB free)", ("CUDA0", "x", None, 0)),
        ("  BLAS: OpenBLAS (0 MiB, 0 MiB free)", None),
        ("  CUDA0: x (24.080 MiB, 23.600 MiB free)", None),
        ("  CUDA0: x (-1 MiB, 5 MiB free)", None),
        ("  CUDA0: x (" + "9" * 5000 + " MiB, 5 MiB free)", None),
        ("  CUDA0,CUDA1: x (100 MiB, 50 MiB free)", None),
        ("ggml_cuda_init: found 1 CUDA devices (100 MiB, 50 MiB free)", None),
        ("  RPC0: 10.0.0.2:50052 (100 MiB, 50 MiB free)", None),
    ],
)
def test_a_line_of_the_list_is_a_device_or_it_is_passed_over(line: str, expected: tuple[Any, ...] | None) -> None:
    text = f"W: some warning: of a driver (1)\nAvailable devices:\n{line}\nW: and another\n"
    found = [
        (one.name, one.description, one.total_bytes and one.total_bytes // MIB, one.free_bytes)
        for one in parse_list(text)
    ]
    assert found == ([] if expected is None else [(*expected[:3], expected[3] * MIB)])


def test_a_device_that_is_listed_twice_is_one() -> None:
    first, second = "  CUDA0: A (100 MiB, 50 MiB free)\n", "  CUDA0: B (70 MiB, 7 MiB free)\n"
    assert [one.description for one in parse_list(first + second)] == ["A"]


TWO_BACKENDS = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23600 MiB free)
  CUDA1: NVIDIA GeForce RTX 4090 (24080 MiB, 23600 MiB free)
  Vulkan0: NVIDIA GeForce RTX 4090 (24564 MiB, 24000 MiB free)
  Vulkan1: NVIDIA GeForce RTX 4090 (24564 MiB, 24000 MiB free)
  Vulkan2: Intel(R) Arc(tm) A770 Graphics (DG2) (16032 MiB, 15000 MiB free)
"""


def test_two_names_for_one_card_are_one_device_also_where_no_library_knows_it() -> None:
    pairs = match(parse_list(TWO_BACKENDS), (), {})
    assert [device.name for device, _ in pairs] == ["CUDA0", "CUDA1", "Vulkan2"]


def test_a_list_without_numbers_in_its_names_is_taken_as_it_is() -> None:
    odd = parse_list("  CUDA: x (100 MiB, 50 MiB free)\n")
    card = Card(Vendor.NVIDIA, "x", "0000:01:00.0", "GPU-1")
    assert [(device.name, card) for device, card in match(odd, [card], {"GGML_CUDA_DEVICES": "2"})] == [("CUDA", card)]


@pytest.mark.parametrize(
    "name,integrated",
    [
        ("AMD Radeon(TM) Vega 8 Graphics", True),
        ("AMD Radeon 680M (RADV REMBRANDT)", True),
        ("AMD Custom GPU 0405 (RADV VANGOGH)", True),
        ("AMD Radeon 8060S Graphics (RADV GFX1151)", True),
        ("Intel(R) Arc(tm) Graphics (MTL)", True),
        ("Intel(R) Arc(TM) 140V GPU (16GB)", True),
        ("Intel(R) Iris(R) Xe Graphics (TGL GT2)", True),
        ("llvmpipe (LLVM 19.1.7, 256 bits)", True),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", False),
        ("AMD Radeon(TM) Pro WX 7100 Graphics", False),
        ("Intel(R) Arc(tm) A770 Graphics (DG2)", False),
        ("Intel(R) Arc(tm) Pro B60 Graphics (BMG G21)", False),
        ("Intel(R) Graphics (BMG G21)", False),
    ],
)
def test_what_has_no_memory_of_its_own_is_told_by_its_name(tmp_path: Path, name: str, integrated: bool) -> None:  # noqa: FBT001 - a table's column
    server = write_server(tmp_path / "a", f"Available devices:\n  Vulkan0: {name} (16000 MiB, 15000 MiB free)\n")
    (device,) = detect(environ_in(tmp_path), llama_server=server, root=host_tree(tmp_path / "root")).machine.devices
    assert (device.pool == HOST_POOL) is integrated


@pytest.mark.parametrize(
    "body,says",
    [
        ("kill -SEGV $$", "ended with status -11"),
        ("echo 'error while loading shared libraries: libcudart.so.13' >&2; exit 127", "libcudart.so.13"),
        ("exit 1", "no output"),
        ("printf '\\377\\376 no text'; exit 3", "ended with status 3"),
        ("sleep 600", "no answer within 0.3 s"),
        ("sleep 600 & exit 0", "no answer within 0.3 s"),
        ("exec 1>&- 2>&-; sleep 600", "no answer within 0.3 s"),
        (
            "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done",
            "than",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_one_phrase(tmp_path: Path, body: str, says: str) -> None:
    timeout_s = 30.0 if says == "than" else SHORT_S
    answer = llama.ask(write_script(tmp_path, body), environ_in(tmp_path), timeout_s=timeout_s)
    assert isinstance(answer, str)
    assert says in answer
    assert "\n" not in answer


def test_a_script_that_hangs_takes_what_it_started_with_it(tmp_path: Path) -> None:
    script = write_script(tmp_path, f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    llama.ask(script, environ_in(tmp_path), timeout_s=SHORT_S)
    pid = int((tmp_path / "pid").read_text())
    state = host.process_name(pid)
    assert state is None or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_a_file_that_is_no_program_is_one_phrase(tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_bytes(b"")
    binary.chmod(0o755)
    assert "cannot be started" in str(llama.ask(binary, environ_in(tmp_path)))
    binary.chmod(stat.S_IRUSR)
    assert "Permission denied" in str(llama.ask(binary, environ_in(tmp_path)))
