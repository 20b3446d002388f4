"""What the headers of a model's files say, for whoever asks to be shown it. A plan needs less of them, and sooner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner import gguf
from supervisor.api.models import JsonText
from supervisor.planning.messages import Details


def read(paths: tuple[str, ...], mmproj: str | None, *, whole: bool) -> Details:
    """Return what the model in these files, and its projector, say. Raises ModelFileError, OSError."""
    headers = [_header(path, whole=whole) for path in paths]
    return Details(
        _metadata(headers[0]),
        tuple((tensor.name, tensor.type.name, tensor.shape) for header in headers for tensor in header.tensors),
        None if mmproj is None else _metadata(_header(mmproj, whole=whole)),
    )


def _header(path: str, *, whole: bool) -> gguf.Header:
    with Path(path).open("rb") as file:
        return gguf.read_header(file, path, whole=whole)


def _metadata(header: gguf.Header) -> Mapping[str, Any]:
    """Return the values by their keys: of a long array its JSON, or None where it was not read."""
    told: dict[str, Any] = {**dict.fromkeys(header.array_lengths), **header.metadata}
    return {key: _written(value) if _is_long(value) else value for key, value in told.items()}


def _is_long(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > gguf.MAX_KEPT_ARRAY


def _written(values: tuple[Any, ...]) -> JsonText:
    told = [None if isinstance(one, float) and not math.isfinite(one) else one for one in values]
    return JsonText(json.dumps(told).encode())
