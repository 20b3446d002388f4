"""Makes the virtual environment, or says in one line why it cannot. Runs under any Python 3.

python scripts/make_venv.py FOLDER
"""

import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)


def main(folder: Path) -> int:
    """Make the environment where there is no whole one, and return an exit status."""
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < OLDEST:
        print(
            f"Python 3.11 or newer is needed, {sys.executable} is {here}: try make PYTHON=python3.11", file=sys.stderr
        )
        return 1
    if all((folder / "bin" / name).exists() for name in ("python", "pip")):
        return 0
    print(f"making {folder} with Python {here}", file=sys.stderr)
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=False)
    if result.returncode != 0:
        print(f"{sys.executable} cannot make {folder} (Debian, Ubuntu: apt install python3-venv)", file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
