"""Why a placement is what it is: the decisions of the search in words, made from what was found. Decides nothing."""

from __future__ import annotations

from planner.model import ModelFacts
from planner.overrides import UNPIPELINED
from planner.search.candidates import Candidate
from planner.search.overflow import sent_on
from planner.types.machine import Machine
from planner.types.plan import Decision, PlacementKind
from planner.types.request import PlanRequest, Policy
from planner.units import format_size


def of_placement(
    found: Candidate, request: PlanRequest, model: ModelFacts, machine: Machine, policy: Policy
) -> tuple[Decision, ...]:
    """Return what was chosen of the knobs that place layers and ``request`` leaves open, and why."""
    decisions: list[Decision] = []

    def decide(step: str, chosen: str, because: str) -> None:
        decisions.append(Decision(step, chosen, because))

    placement = found.placement
    if request.devices is None:
        if len(placement.devices) == 1:
            why = "it has the most room" if found.shortfalls else "one device is enough"
        elif placement.devices:
            why = "PLANNER_SCHED_SPREAD asks for all of them" if policy.spread else "fewer would not hold it"
        else:
            why = "no layer fits on one" if machine.devices else "there is none"
        decide("devices", ", ".join(placement.devices) or "none", why)
    if request.n_gpu_layers is None:
        why = "all fit" if placement.kind is PlacementKind.GPU else "no more fit; the first layers stay on the host"
        why = why if placement.devices else "no device is used"
        decide("layers on devices", f"{placement.n_gpu_layers} of {len(placement.layer_devices) + 1}", why)
    if request.tensor_split is None and len(placement.devices) > 1:
        shares = ", ".join(f"{share:g}" for share in placement.tensor_split)
        full = placement.kind is PlacementKind.GPU and not (leaves_parts(found, request) or _sent_on(found, request))
        why = "so the fullest device is as empty as whole layers allow" if full else "as many as each has room for"
        decide("layers per device", shares, why)
    if leaves_parts(found, request):
        chosen = found.request.n_cpu_moe or found.request.n_cpu_ffn
        what = "experts" if model.hparams.n_expert else "feed-forward matrices"
        which = f"those of the first {chosen} layers" if chosen else "those that --override-tensor names"
        why = "they do not fit, and are read faster there than whole layers would be"
        decide(f"{what} on the CPU", which, why)
    elif sent := _sent_on(found, request):
        why = "everything then lies on devices: each has less than a layer's room left, all together have enough"
        decide("experts on the next device", "; ".join(sent), why)
    elif found.request.override_tensor == UNPIPELINED and request.override_tensor is None:
        decide("pipelining", "off", "without copies of the inputs everything fits (an override of no tensor)")
    return tuple(decisions)


def of_beside(found: Candidate) -> tuple[Decision, ...]:
    """Return where that lies which is loaded beside the model."""
    decisions = []
    for charge in found.beside:
        sizes = ((name, "unknown" if size is None else format_size(size)) for name, size in charge.by_device.items())
        where = ", ".join(f"{size} on {name}" for name, size in sizes)
        decisions.append(Decision(charge.name, where, "loaded beside the model"))
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


def _sent_on(found: Candidate, request: PlanRequest) -> tuple[str, ...]:
    """Return in words which experts the search sends to the device after their layer's."""
    return () if request.override_tensor else sent_on(found.request)
