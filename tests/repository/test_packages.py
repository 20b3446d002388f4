"""What the distribution and its files promise to whoever installs them."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OURS = ("planner", "config", "gpu", "supervisor")
EXTRAS = ("fixtures", "lint", "llama", "test")

# Written apart, so that this file passes its own search.
ADDRESSES = (
    "pypi" + r"\.org",
    "pythonhosted" + r"\.org",
    "hugging" + "face",
    r"\bhf" + r"\.co\b",
    "ghcr" + r"\.io",
    "nvcr" + r"\.io",
    "quay" + r"\.io",
    "docker" + r"\.io",
    r"--(?:extra-)?index" + "-url",
    r"--find" + "-links",
    r"@ (?:https?|file|git\+\w+)" + "://",
)


def pins() -> dict[str, str]:
    """Return name -> version of the constraints file; a line that is no exact pin fails."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line).groups()
            found[canonicalize_name(name)] = version
    return found


def needed_distributions() -> set[str]:
    """Return the names of everything that our distribution needs, with all extras, dependencies of dependencies too."""
    found: set[str] = set()
    queue = [("loadmaster", extra) for extra in ("", *EXTRAS)]
    visited = set(queue)
    while queue:
        name, extra = queue.pop()
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            found.add(needed)
            fresh = {(needed, wanted) for wanted in ("", *requirement.extras)} - visited
            visited |= fresh
            queue.extend(fresh)
    return found


def text_files() -> Iterator[Path]:
    """Yield the files of the tree, without what tools leave in it."""
    for entry in sorted(ROOT.iterdir()):
        if entry.is_file():
            yield entry
        elif entry.name == ".ci" or (not entry.name.startswith(".") and entry.suffix != ".egg-info"):
            yield from (path for path in entry.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


@pytest.mark.parametrize("name", OURS)
def test_no_other_distribution_ships_our_package(name: str) -> None:
    assert set(metadata.packages_distributions()[name]) == {"loadmaster"}


def test_the_constraints_pin_every_needed_distribution_to_what_is_installed() -> None:
    needed = needed_distributions()
    assert needed >= {"aiohttp", "yarl", "ruff", "pytest"}
    assert {name: metadata.version(name) for name in needed} == {name: pins().get(name) for name in needed}


def test_no_file_names_an_address_to_download_from() -> None:
    search = re.compile("|".join(ADDRESSES), re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in text_files()
        if (match := search.search(path.read_text(errors="ignore")))
    ]
    assert found == []
