"""``planner explain`` starts fast because it loads little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# What only the service, the tests or a GPU vendor's tools need; numpy comes with gguf, which explain must not need.
HEAVY = {"aiohttp", "anyio", "gguf", "numpy", "prometheus_client", "pydantic", "pydantic_settings", "structlog"}

PROGRAM = """
import json, sys
from planner.cli import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.mark.parametrize("options", [["--device", "CUDA0=24GiB"], ["--no-gpu"], []], ids=["what-if", "no-gpu", "here"])
def test_explain_loads_nothing_heavy(chat_model: Path, free_environment: dict[str, str], options: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "explain", str(chat_model), "--json", *options],
        env=free_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    status, loaded = json.loads(result.stderr.splitlines()[-1])
    assert status == 0
    assert HEAVY & set(loaded) == set()
