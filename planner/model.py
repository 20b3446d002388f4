"""What the planner needs to know of a model file: hyper-parameters and tensors, from the header alone."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from planner import gguf, hparams, kv_overrides
from planner.architectures import ARCHITECTURES
from planner.errors import ModelFileError
from planner.gguf import MetadataValue
from planner.hparams import HParams
from planner.shapes import contradiction
from planner.types.plan import ModelSummary
from planner.types.request import Role

__all__ = ["Attachment", "HParams", "MetadataValue", "ModelFacts", "Tensor", "read_attachment", "read_model"]

# gguf-split's and llama_split_path's naming (src/llama.cpp).
_SPLIT_NAME: Final = re.compile(r"(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.ASCII)
MAX_SHARDS: Final = 1024

_POOLING_RANK: Final = 4  # LLAMA_POOLING_TYPE_RANK (include/llama.h)

# include/llama.h, llama_ftype, named as quantized files are named
_FILE_TYPES: Final = """
    F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS
    Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0
""".split()  # noqa: SIM905  # a numbered list: the position is the number


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table. ``shape`` is ggml's ``ne`` (innermost first), without trailing ones.

    ``type_id`` is ggml's type number (``planner.ggml``); ``offset`` is absolute in the file of its ``shard``.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    shard: int


@dataclass(frozen=True, slots=True, eq=False)
class Attachment:
    """A file that llama.cpp loads for a model and that is none by itself: a LoRA adapter or a projector."""

    path: str
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ModelFacts:
    """One model: summary for readers, hyper-parameters and tensors for the rules, metadata for what is rare.

    ``tokens`` and other long arrays are not in ``metadata``: an array there is present only where it is short
    (``planner.gguf.MAX_KEPT_ARRAY``). ``shard_bytes`` are the sizes of the files of a split model. ``overrides`` are in
    the metadata already; ``contradiction`` says which tensor does not go with them. ``adapters``, ``projector`` and
    ``draft`` are what a request has loaded with the model (``planner.companions``).
    Compared by identity, so that what is computed once per model can be kept with it.
    """

    summary: ModelSummary
    role: Role
    hparams: HParams
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, MetadataValue]
    paths: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    byte_order: str = "little"
    overrides: tuple[str, ...] = ()
    contradiction: str | None = None
    adapters: tuple[Attachment, ...] = ()
    projector: Attachment | None = None
    draft: ModelFacts | None = None

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor of that name, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_model(path: str, overrides: tuple[str, ...] = ()) -> ModelFacts:
    """Return the facts of the model whose only or first file is ``path``; the other shards are found beside it.

    ``overrides`` are metadata that count instead of the file's own, as ``KEY=TYPE:VALUE``. Raises ModelFileError for a
    file or shard that is missing, unreadable, malformed or no model, and InvalidRequest for a malformed override.
    """
    own = _open(path)
    headers = [replace(own, metadata=kv_overrides.applied(own.metadata, overrides)) if overrides else own]
    paths = _shard_paths(path, headers[0])
    headers += [_open(shard) for shard in paths[1:]]
    _check_shards(paths, headers)
    tensors = _tensors(headers)
    first = headers[0]
    names = frozenset(tensor.name for tensor in tensors)
    facts = hparams.read_hparams(path, first, names)
    return ModelFacts(
        summary=_summary(path, headers, facts),
        role=_role(facts),
        hparams=facts,
        tensors=tensors,
        metadata=first.metadata,
        paths=paths,
        shard_bytes=tuple(header.file_bytes for header in headers),
        byte_order=first.byte_order,
        overrides=overrides,
        contradiction=_contradiction(path, own, first, tensors) if overrides else None,
    )


def _contradiction(path: str, own: gguf.Header, changed: gguf.Header, tensors: tuple[Tensor, ...]) -> str | None:
    """Return which tensor does not go with the changed metadata, though it does with the file's own."""
    names = frozenset(tensor.name for tensor in tensors)
    before, after = (hparams.read_hparams(path, header, names) for header in (own, changed))
    key = f"{after.architecture}.nextn_predict_layers"
    had, has = (header.metadata.get(key, 0) for header in (own, changed))
    added = has - had if isinstance(has, int) and isinstance(had, int) else 0
    return contradiction(tensors, before, after, added)


def read_attachment(path: str) -> Attachment:
    """Return what the header of this file says. Raises ModelFileError where it is missing, unreadable or malformed."""
    header = _open(path)
    return Attachment(path, header.metadata, _tensors([header]))


def _tensors(headers: list[gguf.Header]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(info.name, info.type.id, info.shape, info.nbytes, info.offset, shard)
        for shard, header in enumerate(headers)
        for info in header.tensors
    )


def _open(path: str) -> gguf.Header:
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(path, "is a directory", "give the .gguf file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            raise ModelFileError(path, "is not a regular file", "give a .gguf file")
        with Path(path).open("rb") as file:
            return gguf.read_header(file, path)
    except FileNotFoundError as error:
        raise ModelFileError(path, "there is no such file", "check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelFileError(path, f"cannot be read ({reason})", "check the path and its permissions") from error


def _shard_paths(path: str, first: gguf.Header) -> tuple[str, ...]:
    """Return the paths of all files of the model, the given one first (src/llama-model-loader.cpp, constructor)."""
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return (path,)
    if count > MAX_SHARDS:
        raise ModelFileError(path, f"claims to be split into {count} files", "it is damaged")
    match = _SPLIT_NAME.fullmatch(path)
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            path, f"is one of {count} files of a split model, but not named so", f"name it ...-00001-of-{count:05}.gguf"
        )
    if first.metadata.get("split.no") != 0 or int(match["no"]) != 1:
        raise ModelFileError(
            path, f"is file {match['no']} of a split model", f"give {match['prefix']}-00001-of-{count:05}.gguf instead"
        )
    paths = tuple(f"{match['prefix']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    missing = [shard for shard in paths if not Path(shard).exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelFileError(
            path, f"is split into {count} files and {missing[0]} is missing{more}", "put it beside the others"
        )
    return paths


def _check_shards(paths: tuple[str, ...], headers: list[gguf.Header]) -> None:
    names: set[str] = set()
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        if number and header.metadata.get("split.no") != number:
            raise ModelFileError(path, f"is not file {number + 1} of its model", "fetch that file again")
        for tensor in header.tensors:
            if tensor.name in names:
                raise ModelFileError(path, f"repeats tensor {tensor.name!r} of another shard", "fetch it again")
            names.add(tensor.name)
    expected = headers[0].metadata.get("split.tensors.count", len(names))
    if len(headers) > 1 and expected != len(names):
        raise ModelFileError(
            paths[0], f"and its shards hold {len(names)} tensors, {expected} are due", "fetch all shards again"
        )


def _summary(path: str, headers: list[gguf.Header], facts: HParams) -> ModelSummary:
    infos = [info for header in headers for info in header.tensors]
    name = headers[0].metadata.get("general.name")
    n_params = 0
    for info in infos:
        elements = 1
        for dimension in info.shape:
            elements *= dimension
        n_params += elements
    return ModelSummary(
        path=path,
        name=name if isinstance(name, str) else None,
        architecture=facts.architecture,
        quantization=_quantization(headers[0].metadata.get("general.file_type"), infos),
        file_bytes=sum(header.file_bytes for header in headers),
        tensor_bytes=sum(info.nbytes for info in infos),
        n_params=n_params,
        n_layers=facts.n_layer_all,
        n_ctx_train=facts.n_ctx_train,
    )


def _quantization(file_type: MetadataValue | None, infos: list[gguf.TensorInfo]) -> str | None:
    """Return the name of the mix as the file says it, else the type that holds most bytes."""
    if isinstance(file_type, int) and 0 <= file_type < len(_FILE_TYPES) and _FILE_TYPES[file_type] != "-":
        return _FILE_TYPES[file_type]
    by_type: dict[str, int] = {}
    for info in infos:
        by_type[info.type.name] = by_type.get(info.type.name, 0) + info.nbytes
    return max(by_type, key=lambda name: by_type[name]).upper() if by_type else None


def _role(facts: HParams) -> Role:
    """Return what the header says the model is for; a causal model without pooling is for chat."""
    if facts.pooling_type == _POOLING_RANK:
        return Role.RERANK
    rules = ARCHITECTURES.get(facts.architecture)
    if facts.pooling_type or (rules is not None and rules.embeds):
        return Role.EMBEDDING
    return Role.CHAT
