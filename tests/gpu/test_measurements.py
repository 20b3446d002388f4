"""The script that records what GPUs take, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu_measurements.py"
PRINTED_TO = 0.01 * 1024 * 1024  # llama-server prints MiB with two decimals
N_BUFFERS = 3  # model, context, compute


@pytest.mark.llama
def test_over_stand_ins_it_records_plans_beside_what_llama_server_reports(llama_tools: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--workers", "2", "--models", "1", "--out", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "m.json").read_text())
    assert [run["n_ctx"] for run in record["runs"]] == [2048, 32768]
    for run in record["runs"]:
        assert [device["device"] for device in run["devices"]] == ["RPC0", "RPC1"]
        for device in run["devices"]:
            assert abs(device["planned_buffers_bytes"] - device["reported_bytes"]) <= N_BUFFERS * PRINTED_TO
    assert "A trial without a GPU" in (tmp_path / "m.md").read_text()


def test_without_a_card_and_stand_ins_it_says_what_to_do(tmp_path: Path, python_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "m")],
        env=python_environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "--workers" in done.stderr
    assert not (tmp_path / "m.json").exists()


@pytest.fixture
def python_environment(nvml_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Return an environment whose NVML finds no card."""
    (tmp_path / "none").write_text("")
    return {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(nvml_folder), "FAKE_NVML": str(tmp_path / "none")}
