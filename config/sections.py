"""TOML files of our own: keys as tables, from which parser, documentation and JSON schema derive.

Whatever is wrong with a file is collected, each as one line that names the place, what was given and what is allowed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from config.parse import Kind
from config.resolve import ConfigError, Problem

MAX_FILE_BYTES: Final = 1 << 20  # a thousand sections at a kilobyte each; a larger one is some other file
SHOWN: Final = 60  # characters of a bad value in its error line
Table = Mapping[str, Any]
_JSON_TYPES: Final = MappingProxyType({str: "string", int: "integer", float: "number", bool: "boolean"})


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section. ``parse`` raises ValueError or TypeError for what is not ``allowed``."""

    name: str
    allowed: str
    parse: Callable[[Any], Any]
    meaning: str
    schema: Table
    required: bool = False


def scalar(name: str, kind: Kind[Any], meaning: str, *types: type, required: bool = False) -> Key:
    """Return a key that is read as the setting of the same kind is; TOML's numbers and truths count as their text."""
    accepted = types or (str,)

    def parse(value: Any) -> Any:
        if type(value) not in accepted:
            raise TypeError(value)
        return kind.parse(str(value).lower() if isinstance(value, bool) else str(value))

    return Key(name, kind.allowed, parse, meaning, {"type": [_JSON_TYPES[one] for one in accepted]}, required)


def words(name: str, meaning: str, item: Callable[[str], str] = str, *, required: bool = False) -> Key:
    """Return a key that takes a list of texts, each of them read by ``item``."""

    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
            raise TypeError(value)
        return tuple(map(item, value))

    schema = {"type": "array", "items": {"type": "string"}}
    return Key(name, "a list of texts", parse, meaning, schema, required)


def table(
    name: str,
    meaning: str,
    parse_value: Callable[[str, Any], tuple[str, Any]],
    allowed: str,
    *,
    required: bool = False,
) -> Key:
    """Return a key that takes a table; ``parse_value`` reads one pair of it."""

    def parse(value: Any) -> Table:
        if not isinstance(value, dict):
            raise TypeError(value)
        return MappingProxyType(dict(parse_value(key, each) for key, each in value.items()))

    return Key(name, allowed, parse, meaning, {"type": "object"}, required)


def text_value(key: str, value: Any) -> tuple[str, str]:
    """Return the pair of a table of texts. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(value)
    return key, value


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_text(file: Path) -> str:
    """Return the file's text, empty where there is none. Raises ConfigError."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError((Problem(str(file), "what is there", f"readable: {error.strerror}"),)) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError((Problem(str(file), "a file of this size", f"allowed: at most {MAX_FILE_BYTES} bytes"),))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError((Problem(str(file), f"byte {error.start}", "UTF-8, as TOML is"),)) from None


def document(text: str, name: str) -> Table:
    """Return what the text says, as TOML; ``name`` is the file's in errors. Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError((Problem(name, "the text", f"TOML: {error}"),)) from None


def tables(
    keys: tuple[Key, ...], build: type[Any], content: Table, where: str, problems: list[Problem]
) -> dict[str, Any]:
    """Return a value for each table of tables; what is wrong is added. ``where`` is ``file: [section``, left open."""
    found = {}
    for each, content_of_one in content.items():
        place = f'{where}."{each}"]'
        if not isinstance(content_of_one, dict):
            problems.append(Problem(place, shown(content_of_one), "a table of its own"))
        elif (value := section(keys, build, content_of_one, place, problems)) is not None:
            found[each] = value
    return found


def section(keys: tuple[Key, ...], build: type[Any], table: Table, where: str, problems: list[Problem]) -> Any:
    """Return the section's value, or None where one of its keys is wrong or missing; what is wrong is added."""
    by_name = {key.name: key for key in keys}
    values, before = {}, len(problems)
    for name, value in table.items():
        key = by_name.get(name)
        if key is None:
            problems.append(Problem(f"{where} {name}", "this key", f"one of {', '.join(by_name)}"))
            continue
        try:
            values[name] = key.parse(value)
        except (ValueError, TypeError):
            problems.append(Problem(f"{where} {name}", shown(value), key.allowed))
    missing = [key for key in keys if key.required and key.name not in table]
    problems += [Problem(f"{where} {key.name}", None, key.allowed) for key in missing]
    return build(**values) if len(problems) == before else None


def shown(value: Any) -> str:
    """Return a bad value as its error line shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ---------------------------------------------------------------------------------------------------------------------
# The table told


def object_schema(keys: tuple[Key, ...]) -> dict[str, Any]:
    """Return the JSON schema of a section with these keys."""
    properties = {key.name: {**key.schema, "description": f"{key.meaning} Allowed: {key.allowed}."} for key in keys}
    required = [key.name for key in keys if key.required]
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": required}


def markdown(keys: tuple[Key, ...]) -> str:
    """Return the keys as the documentation lists them."""
    head = ["| key | allowed | meaning |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| `{key.name}` | {key.allowed} | {key.meaning} |" for key in keys)])
