"""Why a placement is what it is: the decisions of the search in words, made from what was found. Decides nothing."""

from __future__ import annotations

from planner.model import ModelFacts
from planner.overrides import UNPIPELINED
from planner.search.candidates import Candidate
from planner.search.overflow import sent_on
from planner.types.machine import Machine
from planner.types.plan import Decision, Placement, PlacementKind
from planner.types.request import PlanRequest, Policy
from planner.units import format_size


def of_placement(
    found: Candidate, request: PlanRequest, model: ModelFacts, machine: Machine, policy: Policy
) -> tuple[Decision, ...]:
    """Return what was chosen of the knobs that place layers and ``request`` leaves open, and why."""
    decisions = []
    if request.devices is None:
        decisions.append(_of_devices(found, machine, policy))
    if request.n_gpu_layers is None:
        decisions.append(_of_layers(found.placement))
    if request.tensor_split is None and len(found.placement.devices) > 1:
        decisions.append(_of_shares(found, request))
    if (parts := _of_parts(found, request, model)) is not None:
        decisions.append(parts)
    return tuple(decisions)


def of_beside(found: Candidate) -> tuple[Decision, ...]:
    """Return where that lies which is loaded beside the model."""
    decisions = []
    for charge in found.beside:
        sizes = ((name, "unknown" if size is None else format_size(size)) for name, size in charge.by_device.items())
        where = ", ".join(f"{size} on {name}" for name, size in sizes)
        decisions.append(Decision(charge.name, where, "loaded beside the model"))
        if kept := ", ".join(f"{format_size(size)} on {name}" for name, size in charge.kept_for_images.items()):
            why = "llama-server aborts where it cannot have that then; --image-max-tokens asks for less"
            decisions.append(Decision("kept free for a large image", kept, why))
    return tuple(decisions)


def leaves_parts(found: Candidate, request: PlanRequest) -> bool:
    """Say whether the search leaves parts of layers to the host that lie on devices, unasked by ``request``."""
    chosen = found.request
    ours = (
        (chosen.n_cpu_moe, request.n_cpu_moe),
        (chosen.n_cpu_ffn, request.n_cpu_ffn),
        (chosen.override_tensor, request.override_tensor),
    )
    return not _sent_on(found, request) and any(own not in {pinned, None, UNPIPELINED} for own, pinned in ours)


def _of_devices(found: Candidate, machine: Machine, policy: Policy) -> Decision:
    devices = found.placement.devices
    if len(devices) == 1:
        why = "it has the most room" if found.shortfalls else "one device is enough"
    elif devices:
        why = "PLANNER_SCHED_SPREAD asks for all of them" if policy.spread else "fewer would not hold it"
    elif found.request.n_gpu_layers == 0:
        why = "-ngl 0 leaves every layer to the host"
    else:
        why = "no layer fits on one" if machine.devices else "there is none"
    return Decision("devices", ", ".join(devices) or "none", why)


def _of_layers(placement: Placement) -> Decision:
    if not placement.devices:
        why = "no device is used"
    elif placement.kind is PlacementKind.GPU:
        why = "all fit"
    else:
        why = "no more fit; the first layers stay on the host"
    on_devices = sum(index >= 0 for index in placement.layer_devices)
    output = ", and the output" if placement.output_device >= 0 else ""
    return Decision("layers on devices", f"{on_devices} of {len(placement.layer_devices)}{output}", why)


def _of_shares(found: Candidate, request: PlanRequest) -> Decision:
    placement = found.placement
    full = placement.kind is PlacementKind.GPU and not (leaves_parts(found, request) or _sent_on(found, request))
    why = "so the fullest device is as empty as whole layers allow" if full else "as many as each has room for"
    if found.params.split_mode == "tensor":
        shares = zip(placement.devices, placement.tensor_split, strict=True)
        return Decision("share of each layer", ", ".join(f"{name} {share:g}" for name, share in shares), why)
    counts = ((name, placement.layer_devices.count(index)) for index, name in enumerate(placement.devices))
    return Decision("layers per device", ", ".join(f"{name} {count}" for name, count in counts), why)


def _of_parts(found: Candidate, request: PlanRequest, model: ModelFacts) -> Decision | None:
    """Return what was decided of parts of layers or of an override in their stead, or None where they were left."""
    if leaves_parts(found, request):
        n_layers = found.request.n_cpu_moe or found.request.n_cpu_ffn
        what = "experts" if model.hparams.n_expert else "feed-forward matrices"
        which = f"those of the first {n_layers} layers" if n_layers else "those that --override-tensor names"
        why = "they do not fit, and are read faster there than whole layers would be"
        return Decision(f"{what} on the CPU", which, why)
    if sent := _sent_on(found, request):
        why = "everything then lies on devices: each has less than a layer's room left, all together have enough"
        return Decision("experts on the next device", "; ".join(sent), why)
    if found.request.override_tensor == UNPIPELINED and request.override_tensor is None:
        why = "without copies of the inputs everything fits (an override of no tensor)"
        return Decision("pipelining", "off", why)
    return None


def _sent_on(found: Candidate, request: PlanRequest) -> tuple[str, ...]:
    """Return in words which experts the search sends to the device after their layer's."""
    return () if request.override_tensor else sent_on(found.request)
