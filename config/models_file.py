"""The models file: what is particular to single models, and runners that are not llama-server's, in one TOML file.

What a model does not say, ``[defaults]`` says, else the environment. Which models there are is not known here, nor
which flags llama-server has.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from config.model_settings import ExternalRunner, ModelSettings, ModelsFile, Table
from config.models_table import DEFAULT_KEYS, FIELDS, SECTIONS, Key
from config.resolve import ConfigError, Problem

MAX_FILE_BYTES: Final = 1 << 20  # a thousand models at a kilobyte each; a larger one is some other file
SHOWN: Final = 60  # characters of a bad value in its error line


def read(file: Path) -> ModelsFile:
    """Return what the file says; nothing where there is none. Raises ConfigError with everything that is wrong."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ModelsFile()
    except OSError as error:
        raise ConfigError((Problem(str(file), "what is there", f"readable: {error.strerror}"),)) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(
            (Problem(str(file), "a file of this size", f"a models file: at most {MAX_FILE_BYTES} bytes"),)
        )
    try:
        return parse(data.decode(), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError((Problem(str(file), f"byte {error.start}", "UTF-8, as TOML is"),)) from None


def parse(text: str, name: str) -> ModelsFile:
    """Return what this text of a models file says; ``name`` is the file's in errors. Raises ConfigError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((Problem(name, "the text", f"TOML: {error}"),)) from None
    problems: list[Problem] = []
    found: dict[str, dict[str, Any]] = {"models": {}, "external": {}}
    defaults = ModelSettings()
    for section, content in document.items():
        where = f"{name}: [{section}]"
        if section == "defaults" and isinstance(content, dict):
            defaults = _section(DEFAULT_KEYS, ModelSettings, content, where, problems) or defaults
        elif section in SECTIONS and isinstance(content, dict):
            keys, build, _ = SECTIONS[section]
            for each, table in content.items():
                place = f'{name}: [{section}."{each}"]'
                if not isinstance(table, dict):
                    problems.append(Problem(place, _shown(table), "a table of its own"))
                elif (value := _section(keys, build, table, place, problems)) is not None:
                    found[section][each] = value
        else:
            problems.append(Problem(where, "this name", "one of defaults, models, external"))
    file = ModelsFile(defaults, MappingProxyType(found["models"]), MappingProxyType(found["external"]))
    problems += _shared_names(file, name)
    if problems:
        raise ConfigError(tuple(problems))
    return file


def _section(keys: tuple[Key, ...], build: type[Any], table: Table, where: str, problems: list[Problem]) -> Any:
    """Return the section's value, or None where one of its keys is wrong or missing; what is wrong is added."""
    by_name = {key.name: key for key in keys}
    values, before = {}, len(problems)
    for name, value in table.items():
        key = by_name.get(name)
        if key is None:
            problems.append(Problem(f"{where} {name}", "this key", f"one of {', '.join(by_name)}"))
            continue
        try:
            values[FIELDS.get(name, name)] = key.parse(value)
        except (ValueError, TypeError):
            problems.append(Problem(f"{where} {name}", _shown(value), key.allowed))
    missing = [key for key in keys if key.required and key.name not in table]
    problems += [Problem(f"{where} {key.name}", "nothing", f"{key.allowed}, which it needs") for key in missing]
    return build(**values) if len(problems) == before else None


def _shared_names(file: ModelsFile, name: str) -> Iterator[Problem]:
    """Yield a problem for each name that two models or programs would answer to."""
    taken: dict[str, str] = {}
    everyone: list[tuple[str, ModelSettings | ExternalRunner]] = [*file.models.items(), *file.external.items()]
    for owner, settings in everyone:
        for each in {owner, *settings.aliases}:
            if taken.setdefault(each.lower(), owner) != owner:
                yield Problem(f"{name}: {owner}", repr(each), f"a name of its own: {taken[each.lower()]} has it")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ---------------------------------------------------------------------------------------------------------------------
# The table told


def json_schema() -> dict[str, Any]:
    """Return the file's JSON schema, for editors; it knows types and names, ``parse`` knows ranges and spellings."""
    defaults = _object_schema(DEFAULT_KEYS)
    sections = {
        section: {"type": "object", "description": about, "additionalProperties": _object_schema(keys)}
        for section, (keys, _, about) in SECTIONS.items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Loadmaster's models file",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": {**defaults, "description": "For every model that says nothing else."}, **sections},
    }


def _object_schema(keys: tuple[Key, ...]) -> dict[str, Any]:
    properties = {key.name: {**key.schema, "description": f"{key.meaning} Allowed: {key.allowed}."} for key in keys}
    required = [key.name for key in keys if key.required]
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


def markdown_page() -> str:
    """Return the page of the documentation, as a file's whole text."""
    lines = []
    for section, (keys, _, about) in SECTIONS.items():
        lines += ["", f"## `[{section}]`", "", about, "", "| key | allowed | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{key.name}` | {key.allowed} | {key.meaning} |" for key in keys]
    tables = "\n".join(lines)
    return f"""# The models file

What is particular to single models, and programs that share the devices with them, in one TOML file:
`PLANNER_MODELS_FILE`, which need not be there. `deploy/models.toml` is an example. A key means the same as the setting
or the llama-server flag of its name; what a model does not say, `[defaults]` says, else the environment. `[defaults]`
takes the keys of `[models]` but for `aliases`, `draft` and `projector`. This page is printed by
`python -m config.models_file`, the JSON schema for editors by `planner check --schema`.
{tables}
"""


if __name__ == "__main__":
    sys.stdout.write(markdown_page())
