"""LoRA adapters: two small matrices beside each matrix that they change (src/llama-adapter.cpp).

What they add to the graphs is the graphs' affair (``planner.graphs.blocks``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from planner import adapters, ggml, weights
from planner.accounting import DeviceBytes, figure
from planner.buffers import HOST_BUFFER, buffer_type
from planner.charges import Charge
from planner.types.machine import HOST
from planner.types.usage import NOTHING, HostDetail

if TYPE_CHECKING:
    from planner.context import ContextParams
    from planner.model import Attachment, ModelFacts, Tensor
    from planner.types.machine import LlamaBuild, Machine
    from planner.types.plan import Placement


def refusal(model: ModelFacts, adapter: Attachment) -> str | None:
    """Return why llama.cpp would not load this adapter for this model, or None (``llama_adapter_lora_init_impl``)."""
    kind = (adapter.metadata.get("general.type"), adapter.metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        return f"{adapter.path} is no LoRA adapter"
    architecture = adapter.metadata.get("general.architecture")
    if architecture != model.hparams.architecture:
        return f"{adapter.path} is an adapter for {architecture}, the model is {model.hparams.architecture}"
    if name := adapters.stranger(adapter):
        return f"{adapter.path} holds {name}, which belongs to no LoRA adapter"
    for name, pair in adapters.pairs(adapter).items():
        if problem := _misfit(model, name, pair):
            return f"{adapter.path}: {problem}; is it an adapter of another model?"
    return None


def charge(
    model: ModelFacts, params: ContextParams, placement: Placement, machine: Machine, build: LlamaBuild
) -> Charge:
    """Return what the model's adapters take: each pair where the matrix lies that it changes.

    The model's weights must have a rule (``weights.not_built``).
    """
    homes = weights.tensor_homes(model, params, placement, machine)
    rules = [*(buffer_type(machine.device(name)) for name in placement.devices), HOST_BUFFER]
    sums = Counter[int]()
    for adapter in model.adapters:
        for name, pair in adapters.pairs(adapter).items():
            for tensor in pair:
                home = homes.get(name, -1)
                type_ = ggml.TYPES[tensor.type_id]
                sums[home] += rules[home].allocation(type_, tensor.shape[0], tensor.nbytes)
    names = (*placement.devices, HOST)
    return Charge(
        "LoRA adapters",
        {
            names[home]: DeviceBytes(figure(size, build, certain=rules[home].certain), NOTHING, NOTHING)
            for home, size in sums.items()
        },
        HostDetail(allocated_bytes=sums[-1]),
    )


def _misfit(model: ModelFacts, name: str, pair: tuple[Tensor, ...]) -> str | None:
    base = model.tensor(name)
    if len(pair) != adapters.N_PARTS:
        return f"the pair for {name} lacks a part"
    if base is None:
        return f"the model has no tensor {name}"
    a, b, (n_in, n_out) = *(_shape(tensor) for tensor in pair), _shape(base)
    looked_up = name == adapters.EMBEDDING
    fits = (b[1], a[1]) == (n_in, n_out) if looked_up else (a[0], b[1]) == (n_in, n_out) and a[1] == b[0]
    return None if fits else f"the pair for {name} has another shape than the model's"


def _shape(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1] if len(tensor.shape) > 1 else 1
