"""The values and interfaces that every part leans on are what they were: changing them is a decision, not an accident.

After a deliberate change: ``python tests/repository/test_interfaces.py`` writes the golden file anew; review the diff.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from pathlib import Path
from types import ModuleType

from planner.types import machine, plan, request, usage
from supervisor.api import errors, lease, models, need, runtime, snapshot, store

GOLDEN = Path(__file__).resolve().parents[2] / "fixtures" / "golden" / "interfaces.txt"


def described(module: ModuleType) -> list[str]:
    """Return one line per public name that the module defines: fields and types, values, or signatures."""
    lines = [f"# {module.__name__}"]
    for name, value in vars(module).items():
        if not inspect.isclass(value) or value.__module__ != module.__name__:
            continue
        if issubclass(value, enum.Enum):
            lines.append(f"{name} = {' | '.join(member.value for member in value)}")
        elif dataclasses.is_dataclass(value):
            lines.append(f"{name}:")
            lines += [f"    {field.name}: {field.type}" for field in dataclasses.fields(value)]
        else:
            lines.append(f"{name}({', '.join(base.__name__ for base in value.__bases__)}):")
            lines += [
                f"    {each}{inspect.signature(method)}"
                for each, method in vars(value).items()
                if inspect.isfunction(method) and method.__module__ == module.__name__ and is_public(each)
            ]
    return lines


def is_public(name: str) -> bool:
    """Say whether a method is part of what others call."""
    return name == "__init__" or not name.startswith("_")


def rendered() -> str:
    """Return the text of the golden file."""
    planned = (machine, request, usage, plan)
    served = (errors, need, lease, models, snapshot, runtime, store)
    return "\n\n".join("\n".join(described(part)) for part in (*planned, *served)) + "\n"


def test_the_interfaces_that_other_parts_lean_on_are_unchanged() -> None:
    assert rendered() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(rendered())
