"""The page of states shows the table as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_diagram_of_states_is_the_table_s() -> None:
    """After a deliberate change: ``python scripts/render_states.py > docs/states.md``."""
    script = ROOT / "scripts" / "render_states.py"
    rendered = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    assert (ROOT / "docs" / "states.md").read_text() == rendered
