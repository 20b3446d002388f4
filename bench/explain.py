"""Times ``planner explain`` beside llama.cpp's own fit on the same file: a model with a vocabulary of 262,144 tokens.

    python bench/explain.py [RUNS]

Both are whole processes, run in turn; the medians, their ratio and the planner's resident memory are printed. Exit
status 1 where the ratio is above ``MAX_RATIO`` or the memory above ``MAX_RSS_MIB``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
WRITE = "import sys, tiny_models; tiny_models.write_large_vocabulary_header(sys.argv[1])"
RUNS = 9
MAX_RATIO = 0.75
MAX_RSS_MIB = 80


def run(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the MiB of peak resident memory of one process. Raises where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main() -> int:
    """Run the comparison and print it."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    tools = Path(sysconfig.get_path("platlib")) / "bin"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "large-vocabulary.gguf"
        # In a process of its own: a child's peak memory starts at its parent's, so this one must stay small.
        subprocess.run([sys.executable, "-c", WRITE, str(model)], cwd=FIXTURES, check=True)
        ours = [sys.executable, "-m", "planner", "explain", str(model), "--json", "--host-memory", "64GiB"]
        theirs = [str(tools / "llama-fit-params"), "-m", str(model), "--fit-print", "on"]
        run(ours)  # the first run writes bytecode and remembers llama-server's answers
        pairs = [(run(ours), run(theirs)) for _ in range(runs)]
    our_s = statistics.median(seconds for (seconds, _), _ in pairs)
    their_s = statistics.median(seconds for _, (seconds, _) in pairs)
    rss_mib = max(rss for (_, rss), _ in pairs)
    print(f"planner explain              {our_s:.3f} s, {rss_mib:.0f} MiB resident")
    print(f"llama-fit-params --fit-print {their_s:.3f} s")
    print(f"ratio                        {our_s / their_s:.2f} (at most {MAX_RATIO})")
    return 0 if our_s / their_s <= MAX_RATIO and rss_mib <= MAX_RSS_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
