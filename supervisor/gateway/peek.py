"""Reads the few fields of a request body that the gateway needs, and leaves the body alone.

The whole body is parsed once, by ``json.loads``: a hand-written scan for the two keys is no faster in Python (48 MB
with one long string: 75 ms; the usual chat of 10 kB: 50 us) and would have to get escapes, nesting and duplicates
right by itself. What is forwarded is always the client's own bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from supervisor.gateway.errors import BadRequest

# A name goes into log lines and error texts; no path below the models folder is longer (PATH_MAX).
MAX_MODEL_NAME_CHARS: Final = 4096
# A form's part has a name and perhaps a file name; its head is short. llama-server's forms hold a handful of fields.
_PART_NAME: Final = re.compile(rb'^content-disposition:[^\r\n]*[; ]name="?([^";\r\n]*)"?', re.IGNORECASE | re.MULTILINE)
_BOUNDARY: Final = re.compile(r'boundary="?([^";,]+)"?', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Peek:
    """What the gateway knows of a request: the model's name as the client wrote it, and whether it wants a stream.

    ``keep_alive`` and ``num_ctx`` are what the client sent under these names, not checked yet; llama-server knows
    neither, and skips what it does not know. ``is_form`` says that the body is no JSON.
    """

    model: str
    stream: bool
    keep_alive: Any = None
    num_ctx: Any = None
    is_form: bool = False


async def read_body(request: web.Request) -> bytes:
    """Return the request's body, unpacked where it came compressed. Raises ``BadRequest``."""
    try:
        return await request.read()
    except web.RequestPayloadError as error:
        raise BadRequest("the request body breaks off, or is not encoded as its headers say") from error


def peek(body: bytes) -> Peek:
    """Return the top-level ``model`` and ``stream`` of a JSON object. Raises ``BadRequest``."""
    fields = object_of(body)
    return Peek(_model(fields), fields.get("stream") is True, fields.get("keep_alive"), fields.get("num_ctx"))


def peek_form(body: bytes, content_type: str) -> Peek:
    """Return ``model`` and ``stream`` of a form with files (multipart/form-data). Raises ``BadRequest``."""
    if (boundary := _BOUNDARY.search(content_type)) is None:
        raise BadRequest("the form in the request body has no boundary in its Content-Type")
    fields: dict[str, str] = {}
    for part in body.split(b"--" + boundary[1].encode()):
        head, _, value = part.partition(b"\r\n\r\n")
        if (name := _PART_NAME.search(head)) is not None and name[1] in {b"model", b"stream"}:
            fields[name[1].decode()] = value.removesuffix(b"\r\n").decode("utf-8", "replace")
    return Peek(_model(fields), fields.get("stream") == "true", is_form=True)


def _model(fields: Mapping[str, Any]) -> str:
    model = fields.get("model")
    if model is None:
        raise BadRequest('"model" is missing; GET /v1/models lists the names', param="model")
    if not isinstance(model, str) or not model or len(model) > MAX_MODEL_NAME_CHARS:
        raise BadRequest('"model" must be a name; GET /v1/models lists them', param="model")
    return model


def object_of(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a request body is. Raises ``BadRequest``.

    A key that stands twice counts as llama-server's parser counts it: the last one holds.
    """
    if not body:
        raise BadRequest('the request body is empty; send a JSON object with at least "model"')
    try:
        fields = json.loads(str(body, "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"the request body is not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting beyond Python's stack
        raise BadRequest("the request body is not usable: a number too long or nesting too deep") from error
    if not isinstance(fields, dict):
        raise BadRequest("the request body is not a JSON object")
    return fields
