"""``python -m planner.oracle_fit_child``: runs llama-fit-params on stand-ins for devices, and tells what it printed.

The question is ``planner.oracle_fit``'s. The answer's ``line`` is what the tool printed, None where it gave up;
``n_ctx`` is then the context that it had chosen by that time, None where it had not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any, Final

from planner.oracle_child import Unusable, worker

LOG_VERBOSITY: Final = "4"  # the line below is on that level (common/log.cpp)
LAST_LINE: Final = "exiting"  # of a tool that gave up (tools/fit-params/fit-params.cpp)
ATTEMPTS: Final = 3
_SHORTENED: Final = re.compile(r"context size reduced from \d+ to (\d+)")  # common/fit.cpp, common_params_fit_impl


def main() -> int:
    """Answer the question on stdin; 0 where there is an answer."""
    question = json.load(sys.stdin)
    count = question["n_devices"]
    try:
        with worker(question["worker"], count) as endpoint:
            done = _run(question, endpoint, count)
    except (OSError, Unusable) as error:
        sys.stderr.write(f"oracle: {error}\n")
        return 1
    gave_up = done.returncode != 0
    shortened = _SHORTENED.findall(done.stderr + done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("-c ")]
    line = None if gave_up or not lines else lines[-1].strip()
    json.dump({"line": line, "n_ctx": int(shortened[-1]) if shortened else None}, sys.stdout)
    return 0


def _run(question: dict[str, Any], endpoint: str, count: int) -> subprocess.CompletedProcess[str]:
    """Run the tool to its end, again where it gave up and left before its log was written (it calls ``exit``)."""
    devices = ",".join(f"RPC{index}" for index in range(count))
    margins = ",".join(map(str, question["margins_mib"]))
    where = ["--rpc", endpoint, "-dev", devices, "-fitt", margins]
    command = [question["tool"], "-m", question["model"], *where, *question["flags"], "-lv", LOG_VERBOSITY]
    for _ in range(ATTEMPTS - 1):
        done = _once(command)
        if done.returncode == 0 or LAST_LINE in done.stderr + done.stdout:
            return done
    return _once(command)


def _once(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the tool that belongs to the llama-server in use
        command, capture_output=True, text=True, errors="replace", env={}, check=False
    )


if __name__ == "__main__":
    sys.exit(main())
