"""Where every weight lies and what it takes there (src/llama-model-loader.cpp, ``create_tensor``; src/llama-model.cpp).

A model is cut into slots: its blocks, the output, and the input, which always stays on the host. A slot's weights go to
the device that the slot is placed on, unless an override names another place or the device lacks the operation that
reads them. On the host a weight is mapped from its file, or allocated, or allocated in pinned memory.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from planner import ggml
from planner.architectures import ARCHITECTURES, Architecture
from planner.buffers import BufferType, buffer_type
from planner.host_memory import HostRule, HostShare, Keeping, host_rule, keeping
from planner.operations import Operation, Weight, operation, runs_on
from planner.types.machine import DeviceKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.context import ContextParams
    from planner.model import HParams, ModelFacts, Tensor
    from planner.types.machine import Device, LlamaBuild, Machine
    from planner.types.plan import Placement

_BLOCK: Final = re.compile(r"(?:(?:enc|dec)\.)?(?:blk|posnet|convnext)\.(\d{1,4})\.(.+)", re.ASCII)
_INPUT: Final = re.compile(r"(token_embd|position_embd|token_types|per_layer_token_embd)\.")
_FIRST_BLOCK: Final = re.compile(
    r"(token_embd_norm|per_layer_model_proj|per_layer_proj_norm|conv1d|hrm\.z_l_init|nextn\.pre_projection)(\.|$)"
)
_OUTPUT: Final = re.compile(
    r"((enc\.|dec\.)?output(_norm)?|output_hc_\w+|output_res_score|token_embd_norm|cls(\.output|\.norm)?|dense_[23]"
    r"|altup_(proj|unembd_proj)|nextn\.post_projection|fc|d2t|markov_w[12]|conf_proj|selector_\w+)(\.|$)"
)
_ROPE: Final = re.compile(r"rope_(freqs|factors_long|factors_short)\.")
_NEVER_LOADED: Final = re.compile(r"masked_embd_(centroids|ordering)|dec\.blk\.\d+\.cross_attn_rel_b")
_SUFFIXES: Final = frozenset({"weight", "bias", "scale", "scales", "input_scale", "lora_a", "lora_b"})
_NORM_AT_OUTPUT: Final = frozenset({"lfm2", "lfm2moe"})  # theirs is the output's, though called token_embd_norm
_ROPE_WITHOUT_WINDOW: Final = frozenset({"gemma4", "gemma4-assistant"})
_EMBEDDING: Final = "token_embd.weight"
_HOST: Final = -1
_HOST_BUFFERS: Final = frozenset({"CPU"})

# Kinds whose answers to "do you run that operation" are known (planner.operations).
_KNOWN_KINDS: Final = frozenset({DeviceKind.CUDA, DeviceKind.ROCM, DeviceKind.RPC})


@dataclass(frozen=True, slots=True)
class Share:
    """What one slot puts on its device, on the host, and on other devices by an override."""

    device_bytes: int
    host: HostShare
    elsewhere: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """The weights of a placement: bytes on each device, whether they are certain, and the host's share."""

    devices: tuple[int, ...]
    host: HostShare
    certain_devices: tuple[bool, ...]


def not_built(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> str | None:
    """Return why the weights of this placement cannot be computed, or None."""
    if model.hparams.architecture not in ARCHITECTURES:
        return f"the weights of the unknown architecture {model.hparams.architecture}"
    devices = [machine.device(name) for name in placement.devices]
    places = {_place(buffer, devices) for pattern, buffer in params.overrides if _matched(model, pattern)}
    if elsewhere := sorted(places - {*placement.devices, *_HOST_BUFFERS}):
        return f"overrides to {elsewhere[0]}, which is not among the devices"
    if unknown := _slots(model, loads_draft_head=params.loads_draft_head)[1]:
        return f"the place of tensor {unknown}"
    return None


def weight_bytes(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> WeightBytes:
    """Return where the weights of this placement lie. ``not_built`` must be None."""
    devices = [machine.device(name) for name in placement.devices]
    rule = host_rule(params, devices, machine, build)
    overrides = tuple((pattern, _place(buffer, devices)) for pattern, buffer in params.overrides)
    places = tuple((device.name, buffer_type(device)) for device in devices) if overrides else ()
    head = params.loads_draft_head
    tables = [
        _shares(model, buffer_type(device), device.kind, rule, overrides, places, loads_draft_head=head)
        for device in devices
    ]
    on_host = _shares(model, None, DeviceKind.HOST, rule, overrides, places, loads_draft_head=head)
    homes = (*placement.layer_devices, placement.output_device, _HOST)
    chosen = [((on_host if home == _HOST else tables[home])[slot], home) for slot, home in enumerate(homes)]
    chosen += [
        ((on_host if home == _HOST else tables[home])[len(homes)], home)
        for home in _rope_homes(model, params, placement)
    ]
    sums, host = [0] * len(devices), HostShare()
    for share, home in chosen:
        if home != _HOST:
            sums[home] += share.device_bytes
        host.add(share.host)
        for name, size in share.elsewhere.items():
            sums[placement.devices.index(name)] += size
    return WeightBytes(
        devices=tuple(sums),
        host=host,
        certain_devices=tuple(buffer_type(device).certain and device.kind in _KNOWN_KINDS for device in devices),
    )


def unknown_buffer(overrides: Sequence[tuple[str, str]], devices: Sequence[Device]) -> str | None:
    """Return the first buffer type that none of these devices has, nor the host (``parse_tensor_buffer_overrides``)."""
    known = {*(device.name for device in devices), *_HOST_BUFFERS}
    return next((buffer for _, buffer in overrides if _place(buffer, devices) not in known), None)


def tensor_homes(model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine) -> dict[str, int]:
    """Return which device of the placement holds each tensor, -1 for the host; the host's of two copies.

    ``not_built`` must be None.
    """
    devices = [machine.device(name) for name in placement.devices]
    overrides = tuple((pattern, _place(buffer, devices)) for pattern, buffer in params.overrides)
    overridden = _overridden(model, overrides)
    slots, _ = _slots(model, loads_draft_head=params.loads_draft_head)
    ropes = _rope_homes(model, params, placement)
    owners = zip(slots, (*placement.layer_devices, placement.output_device, _HOST), strict=False)
    homes: dict[str, int] = {}
    for weights, home in (*owners, *((slots[-1], home) for home in ropes)):
        for weight in weights:
            name, place = weight.tensor.name, overridden.get(weight.tensor.name)
            found = _HOST
            if place is not None:
                found = placement.devices.index(place) if place in placement.devices else _HOST
            elif home != _HOST and runs_on(devices[home].kind, weight.reads, weight.tensor, model):
                found = home
            homes[name] = min(found, homes.get(name, found))
    return homes


def tied_output(model: ModelFacts) -> Tensor | None:
    """Return the embedding where it serves as the output too, None where the file has an output of its own."""
    if not ARCHITECTURES[model.hparams.architecture].ties_output or model.tensor("output.weight") is not None:
        return None
    return model.tensor(_EMBEDDING)


@lru_cache(maxsize=32)
def slot_tensors(model: ModelFacts, *, loads_draft_head: bool) -> tuple[tuple[Tensor, ...], ...]:
    """Return the tensors of each block, then of the output: those that are loaded, an embedding used twice included.

    ``not_built`` must be None.
    """
    slots, _ = _slots(model, loads_draft_head=loads_draft_head)
    return tuple(tuple(weight.tensor for weight in slot) for slot in slots[: model.hparams.n_layer_all + 1])


@lru_cache(maxsize=32)
def _slots(model: ModelFacts, *, loads_draft_head: bool) -> tuple[tuple[tuple[Weight, ...], ...], str | None]:
    """Return the weights of each block, the output, the input and the rotation factors; and a name without a place."""
    hparams = model.hparams
    rules = ARCHITECTURES[hparams.architecture]
    slots: list[list[Weight]] = [[] for _ in range(hparams.n_layer_all + 3)]
    unknown = None
    for tensor in model.tensors:
        if _NEVER_LOADED.match(tensor.name):
            continue
        slot, stem = _slot_of(tensor.name, hparams)
        if slot is None or slot >= len(slots):
            unknown = tensor.name
        elif loads_draft_head or not _skipped(hparams, slot, stem, rules):
            head, _, tail = stem.rpartition(".")
            stem, suffix = (head, tail) if tail in _SUFFIXES else (stem, "")
            lazy = rules.lazy_embedding and stem == "per_layer_token_embd"
            slots[slot].append(Weight(tensor, operation(hparams.architecture, stem, suffix), lazy=lazy))
    if (embedding := tied_output(model)) is not None:
        slots[hparams.n_layer_all].append(Weight(embedding, Operation.MUL_MAT, tied=True))
    return tuple(map(tuple, slots)), unknown


def _slot_of(name: str, hparams: HParams) -> tuple[int | None, str]:
    """Return a tensor's slot, None where none is known for it, and its name without the block's."""
    if block := _BLOCK.match(name):
        return int(block[1]), block[2]
    output, input_, ropes = (hparams.n_layer_all + index for index in range(3))
    slot = None
    if _INPUT.match(name):
        slot = input_
    elif _ROPE.match(name):
        slot = ropes
    elif _FIRST_BLOCK.match(name) and hparams.architecture not in _NORM_AT_OUTPUT:
        slot = 0
    elif _OUTPUT.match(name):
        slot = output
    return slot, name


def _skipped(hparams: HParams, slot: int, stem: str, rules: Architecture) -> bool:
    """Say whether a NextN layer's tensor is left out where no draft uses it (``TENSOR_SKIP``)."""
    nextn = hparams.n_layer <= slot < hparams.n_layer_all
    return nextn and rules.nextn_loaded is not None and not re.match(rules.nextn_loaded, stem)


def rotation_factors(model: ModelFacts, placement: Placement, device: int) -> tuple[Tensor, ...]:
    """Return the rotation factors that layers on this device ask for: each place of such layers has a copy."""
    if device not in {placement.layer_devices[layer] for layer in _rope_slots(model)}:
        return ()
    return tuple(weight.tensor for weight in _slots(model, loads_draft_head=False)[0][-1])


def _rope_homes(model: ModelFacts, params: ContextParams, placement: Placement) -> list[int]:
    """Return the homes of layers that ask for rotation factors: each has a copy, but if an override moves them."""
    homes = sorted({placement.layer_devices[layer] for layer in _rope_slots(model)})
    moved = any(_ROPE.match(name) for name in overridden_names(model, params))
    return homes[:1] if moved else homes


@lru_cache(maxsize=32)
def _rope_slots(model: ModelFacts) -> tuple[int, ...]:
    """Return the layers that ask for rotation factors: the trunk's, in gemma4 only those without a window."""
    hparams = model.hparams
    if not _slots(model, loads_draft_head=False)[0][-1]:
        return ()
    layers = range(hparams.n_layer or hparams.n_layer_all)
    if hparams.architecture in _ROPE_WITHOUT_WINDOW:
        return tuple(layer for layer in layers if not hparams.swa_layers[layer])
    return tuple(range(hparams.n_layer_all) if hparams.architecture == "step35" else layers)


def overridden_names(model: ModelFacts, params: ContextParams) -> frozenset[str]:
    """Return the names of the tensors whose place an override names."""
    return frozenset[str]().union(*(_matched(model, pattern) for pattern, _ in params.overrides))


@lru_cache(maxsize=1024)
def _matched(model: ModelFacts, pattern: str) -> frozenset[str]:
    """Return the names of the tensors that an override's pattern matches, anywhere in the name."""
    found = re.compile(pattern).search
    return frozenset(tensor.name for tensor in model.tensors if found(tensor.name))


def _overridden(model: ModelFacts, overrides: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return where overrides put tensors, by name: the first that matches wins."""
    return {name: place for pattern, place in reversed(overrides) for name in _matched(model, pattern)}


@lru_cache(maxsize=128)
def _shares(
    model: ModelFacts,
    buffer: BufferType | None,
    kind: DeviceKind,
    rule: HostRule,
    overrides: tuple[tuple[str, str], ...],
    places: tuple[tuple[str, BufferType], ...],
    *,
    loads_draft_head: bool,
) -> tuple[Share, ...]:
    """Return each slot's share where the slot lies on a device of that buffer type, or on the host for None."""
    overridden = _overridden(model, overrides)
    buffers = dict(places)
    embedding = model.tensor(_EMBEDDING)
    input_copy = keeping(Weight(embedding, Operation.GET_ROWS), rule) if embedding else None
    twice = ARCHITECTURES[model.hparams.architecture].duplicate_first
    shares = []
    for weights in _slots(model, loads_draft_head=loads_draft_head)[0]:
        device_bytes, host, elsewhere = 0, HostShare(), Counter[str]()
        for weight in weights:
            tensor, type_ = weight.tensor, ggml.TYPES[weight.tensor.type_id]
            place = overridden.get(tensor.name)
            if place in buffers:
                if not weight.tied or twice:  # else the input's copy is there already
                    elsewhere[place] += buffers[place].allocation(type_, tensor.shape[0], tensor.nbytes)
            elif place is None and buffer is not None and runs_on(kind, weight.reads, tensor, model):
                device_bytes += buffer.allocation(type_, tensor.shape[0], tensor.nbytes)
            else:
                kept = keeping(weight, rule)
                if not weight.tied or kept is not input_copy or kept is Keeping.MAPPED or twice:
                    host.keep(weight, kept, rule)
        shares.append(Share(device_bytes, host, elsewhere))
    return tuple(shares)


def _place(buffer: str, devices: Sequence[Device]) -> str:
    """Return the name of the device whose default buffer type is meant, or the buffer's own where none is.

    Buffers of RPC workers are told apart by address alone: the number counts the devices of one worker (ggml-rpc.cpp).
    """
    endpoint = buffer.partition("[")[2].rstrip("]")
    return next((device.name for device in devices if endpoint and device.endpoint == endpoint), buffer)
