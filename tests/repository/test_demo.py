"""The demo runs from beginning to end, since it is the first thing that anybody tries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


@pytest.mark.llama
@pytest.mark.usefixtures("llama_tools")
def test_the_demo_explains_serves_answers_and_stops(free_environment: dict[str, str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, DEMO, tmp_path],
        env=free_environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"^Fits on 2 GPUs: 32 of 32 layers", result.stdout, re.MULTILINE)
    assert f"\n{tiny_models.TEXT}\n" in result.stdout
    assert '"state": "ready"' in result.stdout
    assert result.stdout.endswith("it exited with status 0\n")
