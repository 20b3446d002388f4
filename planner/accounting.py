"""The forward model: placement and parameters in, bytes per device out. One entry, for explain and serve alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from planner import cache, tensor_split, weights
from planner.buffers import HOST_BUFFER, buffer_type
from planner.build import is_pinned
from planner.compute import compute_buffers
from planner.types.machine import DeviceKind
from planner.types.usage import UNKNOWN_FIGURE, Figure, HostDetail, Source
from planner.units import MIB

if TYPE_CHECKING:
    from planner.context import ContextParams
    from planner.host_memory import HostShare
    from planner.model import ModelFacts
    from planner.types.machine import LlamaBuild, Machine
    from planner.types.plan import Placement

_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """What llama.cpp reserves on one device, and what is kept free there for a large image."""

    model: Figure
    context: Figure
    compute: Figure
    image_reserve_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes per device of the placement (same order as ``Placement.devices``), and the host's account.

    ``elsewhere`` are devices that the model itself does not use, by name. ``not_built`` names each rule that is missing
    for this model or these flags; the figures it touches are unknown, and an oracle may fill them in. Empty where every
    figure is ours.
    """

    devices: tuple[DeviceBytes, ...]
    host: DeviceBytes
    host_detail: HostDetail
    not_built: tuple[str, ...] = ()
    elsewhere: Mapping[str, DeviceBytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def unknown(self) -> bool:
        """Say whether some figure is not known."""
        return self._has(Source.UNKNOWN)

    @property
    def estimated(self) -> bool:
        """Say whether some figure is only an upper bound."""
        return self._has(Source.ESTIMATED)

    def _has(self, source: Source) -> bool:
        everyone = (*self.devices, self.host, *self.elsewhere.values())
        return any(source in {each.model.source, each.context.source, each.compute.source} for each in everyone)


def account(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> MemoryLedger:
    """Return the bytes that llama-server will reserve on each device of the placement and on the host.

    Weights and caches are exact for the pinned build, compute simulated where the family's graph is built, estimated
    (never below llama.cpp's) where only a closed form is known, unknown otherwise. The host's model figure is the sum
    of what is mapped, allocated and pinned for weights; its output buffer and prompt cache are in the detail alone,
    as llama.cpp's own breakdown leaves them out. What is loaded beside the model is added by ``planner.charges``.
    """
    reasons = list(params.not_built)
    if params.split_mode == "tensor" and placement.devices:
        reason = weights.not_built(model, params, placement, machine) or tensor_split.not_built(model, params)
        if reason is None and not reasons:
            return _sliced(model, params, placement, machine, build)
        reasons += [reason] if reason else []
    unknown = ((UNKNOWN_FIGURE,) * len(placement.devices), UNKNOWN_FIGURE)
    models, contexts, computes, placed = unknown, unknown, unknown, None
    if not reasons:
        if reason := weights.not_built(model, params, placement, machine):
            reasons.append(reason)
        else:
            placed = weights.weight_bytes(model, params, placement, machine, build)
            models = _weights(placed, build)
        if reason := cache.not_built(model):
            reasons.append(reason)
        else:
            contexts = caches(model, params, placement, machine, build)
        buffers = compute_buffers(model, params, placement, machine, build)
        computes = buffers.devices, buffers.host
    return MemoryLedger(
        devices=tuple(map(DeviceBytes, models[0], contexts[0], computes[0])),
        host=DeviceBytes(models[1], contexts[1], computes[1]),
        host_detail=_host_detail(model, params, placed.host if placed else None),
        not_built=tuple(reasons),
    )


def _sliced(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> MemoryLedger:
    """Return the ledger of layers that are cut over all devices: the host's and the graphs' as with one device.

    The tensors of graphs are not cut: each device has a buffer that would hold them whole (ggml-backend-meta.cpp,
    ``get_alloc_size``, ``alloc_buffer``), as was seen on RPC workers.
    """
    alone = replace(
        placement,
        devices=placement.devices[:1],
        layer_devices=tuple(min(device, 0) for device in placement.layer_devices),
        output_device=min(placement.output_device, 0),
        tensor_split=(1.0,),
    )
    whole = account(model, replace(params, split_mode="layer"), alone, machine, build)
    devices = [machine.device(name) for name in placement.devices]
    rules = [buffer_type(device) for device in devices]
    seen = all(device.kind is DeviceKind.RPC for device in devices) and len(set(rules)) == 1
    held = tensor_split.weight_bytes(model, params, alone, machine, placement.tensor_split, rules)
    cached = tensor_split.cache_bytes(model, params, alone, placement.tensor_split, rules)
    computes = [bound if seen else _estimated(bound) for bound in (whole.devices[0].compute, whole.host.compute)]
    return replace(
        whole,
        devices=tuple(
            DeviceBytes(figure(weight, build, certain=seen), figure(kept, build, certain=seen), computes[0])
            for weight, kept in zip(held, cached, strict=True)
        ),
        host=replace(whole.host, compute=computes[1]),
    )


def _estimated(bound: Figure) -> Figure:
    return UNKNOWN_FIGURE if bound.bytes is None else Figure(bound.bytes, Source.ESTIMATED)


def _weights(placed: weights.WeightBytes, build: LlamaBuild) -> tuple[tuple[Figure, ...], Figure]:
    """Return the weights on each device and on the host."""
    on_devices = tuple(
        figure(size, build, certain=certain)
        for size, certain in zip(placed.devices, placed.certain_devices, strict=True)
    )
    host = placed.host
    total = host.mapped_bytes + host.allocated_bytes + host.pinned_bytes
    return on_devices, figure(total, build, certain=host.certain)


def _host_detail(model: ModelFacts, params: ContextParams, host: HostShare | None) -> HostDetail:
    """Return the host's account in detail; what its weights take is open where no rule places them."""
    return HostDetail(
        mapped_bytes=host.mapped_bytes if host else None,
        resident_bytes=_resident_bytes(params, host) if host else None,
        allocated_bytes=host.allocated_bytes if host else None,
        pinned_bytes=host.pinned_bytes if host else None,
        output_buffer_bytes=None if params.not_built else _output_buffer_bytes(model, params),
        prompt_cache_bytes=None if params.cache_ram_mib < 0 else params.cache_ram_mib * MIB,
        checkpoint_bytes=None if cache.not_built(model) else _checkpoint_bytes(model, params),
    )


def _checkpoint_bytes(model: ModelFacts, params: ContextParams) -> int:
    """Return the most that the checkpoints of all slots take (tools/server/server-context.cpp)."""
    return params.n_ctx_checkpoints * params.n_seq_max * cache.checkpoint_bytes(model, params)


def _resident_bytes(params: ContextParams, host: HostShare) -> int:
    """Return what has to stay in memory of the mapped ranges; a range is locked as a whole (``load_all_data``)."""
    return host.mapped_bytes if params.load_mode == "mmap+mlock" else host.mapped_tensor_bytes


def caches(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> tuple[tuple[Figure, ...], Figure]:
    """Return the caches on each device and on the host: a layer's lie where the layer lies, or all on the host."""
    rules = [buffer_type(machine.device(name)) for name in placement.devices]
    tables = [cache.layer_bytes(model, params, rule) for rule in (*rules, HOST_BUFFER)]
    sums = [0] * len(tables)
    for layer, device in enumerate(placement.layer_devices):
        home = device if params.kv_offload else -1  # the last table is the host's
        sums[home] += tables[home][layer]
    figures = tuple(figure(size, build, certain=rule.certain) for size, rule in zip(sums, rules, strict=False))
    return figures, figure(sums[-1], build, certain=True)


def _output_buffer_bytes(model: ModelFacts, params: ContextParams) -> int:
    """Return the largest output buffer that serving needs: logits, and embeddings where asked for.

    (src/llama-context.cpp, ``output_reserve``; llama.cpp leaves it out of its own breakdown.) A chat server keeps one
    row per slot, an embedding server grows to a row per token of a batch.
    """
    rows = max(min(params.n_outputs_max, params.n_batch), params.n_seq_max)
    width = model.hparams.n_vocab + (model.hparams.n_embd_out if params.embeddings else 0)
    return _FLOAT_BYTES * width * rows


def figure(size_bytes: int, build: LlamaBuild, *, certain: bool) -> Figure:
    """Return these bytes: exact for the build whose source the rules mirror and a device whose rules are known."""
    return Figure(size_bytes, Source.EXACT if certain and is_pinned(build) else Source.ESTIMATED)
