"""The models file: what is particular to single models, and runners that are not llama-server's, in one TOML file.

What a model does not say, ``[defaults]`` says, else the environment. Which models there are is not known here, nor
which flags llama-server has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from config.model_settings import ExternalRunner, ModelSettings, ModelsFile
from config.models_table import DEFAULT_KEYS, SECTIONS
from config.resolve import ConfigError, Problem
from config.sections import document, markdown, object_schema, read_text, section, tables


def read(file: Path) -> ModelsFile:
    """Return what the file says; nothing where there is none. Raises ConfigError with everything that is wrong."""
    return parse(read_text(file), str(file))


def parse(text: str, name: str) -> ModelsFile:
    """Return what this text of a models file says; ``name`` is the file's in errors. Raises ConfigError."""
    problems: list[Problem] = []
    found: dict[str, dict[str, Any]] = {"models": {}, "external": {}}
    defaults = ModelSettings()
    for name_of_section, content in document(text, name).items():
        where = f"{name}: [{name_of_section}"
        if name_of_section == "defaults" and isinstance(content, dict):
            defaults = section(DEFAULT_KEYS, ModelSettings, content, f"{where}]", problems) or defaults
        elif name_of_section in SECTIONS and isinstance(content, dict):
            keys, build, _ = SECTIONS[name_of_section]
            found[name_of_section] = tables(keys, build, content, where, problems)
        else:
            problems.append(Problem(f"{where}]", "this name", "one of defaults, models, external"))
    file = ModelsFile(defaults, MappingProxyType(found["models"]), MappingProxyType(found["external"]))
    problems += _shared_names(file, name)
    if problems:
        raise ConfigError(tuple(problems))
    return file


def _shared_names(file: ModelsFile, name: str) -> Iterator[Problem]:
    """Yield a problem for each name that two models or programs would answer to."""
    taken: dict[str, str] = {}
    everyone: list[tuple[str, ModelSettings | ExternalRunner]] = [*file.models.items(), *file.external.items()]
    for owner, settings in everyone:
        for each in {owner, *settings.aliases}:
            if taken.setdefault(each.lower(), owner) != owner:
                yield Problem(f"{name}: {owner}", repr(each), f"a name of its own: {taken[each.lower()]} has it")


# ---------------------------------------------------------------------------------------------------------------------
# The table told


def json_schema() -> dict[str, Any]:
    """Return the file's JSON schema, for editors; it knows types and names, ``parse`` knows ranges and spellings."""
    defaults = object_schema(DEFAULT_KEYS)
    sections = {
        name: {"type": "object", "description": about, "additionalProperties": object_schema(keys)}
        for name, (keys, _, about) in SECTIONS.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Loadmaster's models file",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": {**defaults, "description": "For every model that says nothing else."}, **sections},
    }


def markdown_page() -> str:
    """Return the page of the documentation, as a file's whole text."""
    lines = []
    for name, (keys, _, about) in SECTIONS.items():
        lines += ["", f"## `[{name}]`", "", about, "", markdown(keys)]
    key_tables = "\n".join(lines)
    return f"""# The models file

What is particular to single models, and programs that share the devices with them, in one TOML file:
`PLANNER_MODELS_FILE`, which need not be there. `deploy/models.toml` is an example. A key means the same as the setting
or the llama-server flag of its name; what a model does not say, `[defaults]` says, else the environment. `[defaults]`
takes the keys of `[models]` but for `aliases`, `draft` and `projector`. This page is printed by
`python -m config.models_file`, the JSON schema for editors by `planner check --schema`.
{key_tables}
"""


if __name__ == "__main__":
    sys.stdout.write(markdown_page())
