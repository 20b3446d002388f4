"""Make a model out of another one or of blobs, with what a Modelfile or the fields of a request say of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from supervisor.api.store import BadCreate, CreateRequest, NotInStore, Progress
from supervisor.store import building, listing, manifests, modelfile, parts, writing
from supervisor.store.folder import StoreFolder
from supervisor.store.heeding import FORMS, not_heeded
from supervisor.store.manifests import Layer
from supervisor.store.names import ModelName

# Kinds of which a model has one, so that a new one takes the old one's place; licences are added to the parent's.
_SINGLE: Final[Mapping[str, tuple[str, ...]]] = {
    manifests.TEMPLATE: (manifests.TEMPLATE, manifests.PROMPT),
    manifests.SYSTEM: (manifests.SYSTEM,),
    manifests.PARAMS: (manifests.PARAMS,),
    manifests.MESSAGES: (manifests.MESSAGES,),
}
SHOWN_SOURCE: Final = 200  # characters of a name of a file that was not sent along


@dataclass(frozen=True, slots=True)
class Recipe:
    """What was asked for, the Modelfile read: a parent's name or digests of blobs, and what is said of them."""

    parent: str | None
    blobs: tuple[str, ...]
    adapters: tuple[str, ...]
    template: str | None
    system: str | None
    parameters: Mapping[str, Any]
    messages: tuple[Mapping[str, str], ...]
    licenses: tuple[str, ...]
    for_ollama: Mapping[str, str]


def recipe(spec: CreateRequest) -> Recipe:
    """Return what the request comes to. Raises BadCreate.

    Nothing in it becomes a path: FROM and ADAPTER name a model, a digest, or a file that was sent along as a blob.
    """
    if spec.quantize:
        raise BadCreate("quantize: a model is served as its file is; quantize it first with llama.cpp's llama-quantize")
    base = _of_modelfile(spec) if spec.modelfile is not None else _EMPTY
    parameters = {name.lower(): modelfile.parameter(name.lower(), value) for name, value in spec.parameters.items()}
    made = Recipe(
        parent=spec.parent or base.parent,
        blobs=tuple(spec.files.values()) or base.blobs,
        adapters=tuple(spec.adapters.values()) or base.adapters,
        template=spec.template if spec.template is not None else base.template,
        system=spec.system if spec.system is not None else base.system,
        parameters={**base.parameters, **{name: value for name, value in parameters.items() if value is not None}},
        messages=spec.messages or base.messages,
        licenses=spec.licenses or base.licenses,
        for_ollama={**base.for_ollama, **spec.for_ollama},
    )
    if not made.parent and not made.blobs:
        raise BadCreate("neither 'from' or 'files' was specified")
    return replace(made, parent=None) if made.blobs else made


_EMPTY: Final = Recipe(None, (), (), None, None, {}, (), (), {})


def _of_modelfile(spec: CreateRequest) -> Recipe:
    read = modelfile.parse(spec.modelfile or "")
    blobs = [_blob(source, spec.files) for source in read.sources]
    named = [source for source, blob in zip(read.sources, blobs, strict=True) if blob is None]
    adapters = [_blob(source, spec.adapters) for source in read.adapters]
    missing = [source for source, blob in zip(read.adapters, adapters, strict=True) if blob is None]
    missing += [source for source in named if modelfile.is_path(source) or len(blobs) > 1]
    if missing:
        raise BadCreate(
            f"{missing[0][:SHOWN_SOURCE]!r} is no file of this request: send it as a blob first, and name its digest"
        )
    return Recipe(
        parent=named[0] if named else None,
        blobs=tuple(blob for blob in blobs if blob is not None),
        adapters=tuple(blob for blob in adapters if blob is not None),
        template=read.template,
        system=read.system,
        parameters=read.parameters,
        messages=read.messages,
        licenses=read.licenses,
        for_ollama=read.for_ollama,
    )


def _blob(source: str, sent: Mapping[str, str]) -> str | None:
    """Return the digest that FROM or ADAPTER stands for, None where it is something else."""
    digest = source.removeprefix("@").replace("sha256-", "sha256:")
    return digest if manifests.DIGEST.fullmatch(digest) else sent.get(source)


def create(folder: StoreFolder, name: ModelName, made: Recipe, tell: Callable[[Progress], None]) -> set[str]:
    """Write the model, its manifest last, and return the digests that the name's version before no longer needs.

    Blocks while headers are read. Raises StoreError, OSError.
    """
    layers, for_ollama = _base(folder, made, tell)
    for digest in made.adapters:
        layer = _sent(folder, digest, tell)
        if layer.kind != manifests.ADAPTER:
            raise BadCreate(f"blob {digest} is no adapter")
        layers = (*layers, layer)
    layers = parts.in_order(folder, layers)
    for kind, text in _texts(folder, made, layers).items():
        layers = tuple(layer for layer in layers if layer.kind not in _SINGLE[kind])
        if text:
            layers = (*layers, _new(folder, kind, text, tell))
    for text in made.licenses:
        layers = (*layers, _new(folder, manifests.LICENSE, text, tell))
    facts = building.facts_of(folder, layers)
    config = building.config_layer(folder, facts, layers, for_ollama)
    for line in not_heeded(listing.read_preset(folder, layers, config), facts.metadata):
        tell(Progress(line))
    tell(Progress("writing manifest"))
    return writing.write_manifest(folder, name, manifests.build(layers, config))


def _base(
    folder: StoreFolder, made: Recipe, tell: Callable[[Progress], None]
) -> tuple[tuple[Layer, ...], Mapping[str, str]]:
    """Return the layers that the model begins with, the parent's or the blobs, and what it says to Ollama alone.

    Of a parent's renderer and parser nothing is left where the new model has a template of its own.
    """
    if made.parent is None:
        return tuple(_sent(folder, digest, tell) for digest in made.blobs), made.for_ollama
    parent = folder.existing(made.parent)
    shown = parent.short(folder.default_host)
    manifest = folder.read(parent)
    for layer in manifest.layers:
        tell(Progress(f"using existing layer {layer.digest}"))
    layers = tuple(replace(one, parent=shown) if one.kind == manifests.MODEL else one for one in manifest.layers)
    inherited = listing.read_preset(folder, manifest.layers, manifest.config).for_ollama
    if made.template:
        inherited = {name: value for name, value in inherited.items() if name not in FORMS}
    return layers, {**inherited, **made.for_ollama}


def _sent(folder: StoreFolder, digest: str, tell: Callable[[Progress], None]) -> Layer:
    if not folder.blob(digest).is_file():
        raise NotInStore(f"blob {digest} is not there: send it first")
    tell(Progress("parsing GGUF"))
    layer = building.gguf_layer(folder, digest)
    tell(Progress(f"using existing layer {digest}"))
    return layer


def _texts(folder: StoreFolder, made: Recipe, layers: tuple[Layer, ...]) -> dict[str, str]:
    """Return the texts that take the place of the parent's, by kind; an empty one removes it."""
    texts: dict[str, str] = {}
    if made.template is not None:
        texts[manifests.TEMPLATE] = made.template
    if made.system is not None:
        texts[manifests.SYSTEM] = made.system
    if made.parameters:
        parents = listing.read_preset(folder, layers).parameters
        texts[manifests.PARAMS] = json.dumps({**parents, **made.parameters})
    if made.messages:
        texts[manifests.MESSAGES] = json.dumps([dict(message) for message in made.messages])
    return texts


def _new(folder: StoreFolder, kind: str, text: str, tell: Callable[[Progress], None]) -> Layer:
    layer = writing.write_blob(folder, kind, text.encode(errors="replace"))
    tell(Progress(f"creating new layer {layer.digest}"))
    return layer
