"""The fields of a request body, each checked as it is read; what is wrong is told as Go's JSON decoder tells it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

from supervisor.gateway.errors import BadRequest
from supervisor.gateway.ollama.errors import MISSING_BODY

# Half of a character beyond the first 65,536, as clients send that cut a text anywhere: Go replaces it, and
# llama-server's parser refuses it.
_HALF: Final = re.compile(r"\\u[dD][89a-fA-F]")
_HALF_CHARACTER: Final = re.compile("[\\ud800-\\udfff]")
# What Go calls JSON's kinds of values, and the types of its own that the API is written in.
_JSON_KINDS: Final = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}
_AFTER: Final[Mapping[str, str]] = {
    "Expecting value": "looking for beginning of value",
    "Expecting property name enclosed in double quotes": "looking for beginning of object key string",
    "Expecting ':' delimiter": "after object key",
    "Expecting ',' delimiter": "after a value",
    "Extra data": "after top-level value",
}


class Fields:
    """The top level of a body. ``struct`` is the Go type that Ollama would read it into; it stands in error texts.

    A field that is absent or null is the kind's empty value. Every method raises ``BadRequest`` for another kind.
    """

    def __init__(self, struct: str, values: Mapping[str, Any]) -> None:
        self._struct = struct
        self._values = values

    def any(self, name: str) -> Any:
        """Return the value as it was sent, None where it was not."""
        return self._values.get(name)

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._of(name, "string", str)
        return "" if value is None else str(value)

    def flag(self, name: str) -> bool | None:
        """Return a boolean, None where none was sent."""
        value = self._of(name, "bool", bool)
        return None if value is None else bool(value)

    def whole(self, name: str) -> int:
        """Return an integer."""
        value = self._of(name, "int", int)
        return 0 if value is None else int(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return an object."""
        value = self._of(name, "map[string]interface {}", dict)
        return {} if value is None else dict(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return an array of strings."""
        return tuple(str(one) for one in self._items(name, "[]string", str))

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return an array of integers."""
        return tuple(int(one) for one in self._items(name, "[]int", int))

    def objects(self, name: str, struct: str) -> tuple[Fields, ...]:
        """Return an array of objects; each would be a ``struct``."""
        return tuple(Fields(struct, one) for one in self._items(name, f"[]api.{struct}", dict))

    def raw_objects(self, name: str) -> tuple[Mapping[str, Any], ...]:
        """Return an array of objects that go on as they are."""
        return tuple(self._items(name, "[]interface {}", dict))

    def _items(self, name: str, go_type: str, kind: type) -> list[Any]:
        values = self._of(name, go_type, list) or []
        for value in values:
            if not _is(value, kind):
                raise self._wrong(name, go_type.removeprefix("[]"), value)
        return list(values)

    def _of(self, name: str, go_type: str, kind: type) -> Any:
        value = self._values.get(name)
        if value is not None and not _is(value, kind):
            raise self._wrong(name, go_type, value)
        return value

    def _wrong(self, name: str, go_type: str, value: object) -> BadRequest:
        kind = "null" if value is None else _JSON_KINDS[type(value)]
        field = f"Go struct field {self._struct}.{name} of type {go_type}"
        return BadRequest(f"json: cannot unmarshal {kind} into {field}", param=name)


async def read_fields(request: web.Request, struct: str) -> Fields:
    """Return the fields of the request's body. Raises ``BadRequest``."""
    try:
        body = await request.read()
    except web.RequestPayloadError as error:
        raise BadRequest("unexpected EOF") from error
    return parse_fields(body, struct)


def parse_fields(body: bytes, struct: str) -> Fields:
    """Return the fields of this body. Raises ``BadRequest``."""
    if not body.strip():
        raise BadRequest(MISSING_BODY)
    try:
        text = str(body, "utf-8")
        values = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadRequest(_syntax(error)) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting beyond Python's stack
        raise BadRequest("the body is not usable: a number that is none, or nesting too deep") from error
    if _HALF.search(text):
        values = json.loads(_HALF_CHARACTER.sub("\ufffd", json.dumps(values, ensure_ascii=False)))
    if not isinstance(values, dict):
        kind = "null" if values is None else _JSON_KINDS[type(values)]
        raise BadRequest(f"json: cannot unmarshal {kind} into Go value of type api.{struct}")
    return Fields(struct, values)


def _is(value: object, kind: type) -> bool:
    """Say whether a JSON value is of this kind; Python counts booleans among the integers, JSON does not."""
    return type(value) is kind


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _syntax(error: json.JSONDecodeError) -> str:
    """Return what Go's decoder would say (encoding/json, scanner.go)."""
    if error.pos >= len(error.doc.rstrip()):
        return "unexpected EOF"
    where = _AFTER.get(error.msg, f"in the body: {error.msg}")
    return f"invalid character {error.doc[error.pos]!r} {where}"
