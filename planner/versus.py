"""llama-server as its user would start it, held against the same machine: what it would take, and whether it runs out.

What its flags leave out has llama-server's own defaults here, not ours: the trained context, four conversations that
share one cache, layers spread by free memory, and ``--fit``, which changes what is open where memory is short. It knows
of no margin but that of ``--fit``, so that none of ours is held against it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, NamedTuple

from planner import context, flags
from planner.budget import budgets, overhead_bytes
from planner.errors import InvalidRequest
from planner.model import ModelFacts
from planner.types.machine import Device, DeviceKind, Machine
from planner.types.plan import Plan, PlanOutcome, Refused
from planner.types.request import PerDevice, PlanRequest, Policy
from planner.units import MIB

FIT: Final = "fit"
YOURS: Final = "your flags"
ITS_FIT: Final = "fit by llama.cpp"
N_PARALLEL: Final = 4  # tools/server/server.cpp, where -np is auto
FIT_MARGIN_BYTES: Final = 1024 * MIB  # common/common.h, fit_params_target

# What it chooses, unless the user does; the context as well.
_LEFT_TO_FIT: Final = (
    "devices", "n_gpu_layers", "tensor_split", "override_tensor", "n_cpu_moe", "n_cpu_ffn", "main_gpu",
)  # fmt: skip
_FIT_FLAGS: Final = ("-fit", "--fit")


class Fitted(NamedTuple):
    """What ``--fit`` made of a request: the flags that it chose, and the request with them. See planner.oracle_fit."""

    flags: str
    request: PlanRequest
    gave_up: bool


# Asks llama.cpp itself: a request, names of devices and the bytes of each to be filled. None: it cannot be asked, as
# where there is no device or the bytes of one are not known.
Fit = Callable[[PlanRequest, Sequence[str], Sequence[int]], Fitted | None]
Search = Callable[[PlanRequest, Policy], PlanOutcome]


@dataclass(frozen=True, slots=True)
class Versus:
    """What llama-server would do, called ``name``; its ``flags``, and ``notes`` on what it makes of them."""

    name: str
    flags: str
    outcome: PlanOutcome
    notes: tuple[str, ...] = ()


def of_flags(text: str, model: ModelFacts, machine: Machine, policy: Policy, search: Search, fit: Fit) -> Versus:
    """Return what llama-server would do with these flags. Raises InvalidRequest where they make no sense."""
    words, asked = _read(text, model)
    fits_itself = not any(word in _FIT_FLAGS and value == "off" for word, value in pairwise(words))
    devices = _devices(asked, machine)
    theirs = replace(policy, gpu_overhead=PerDevice(0), max_vram=PerDevice())
    outcome = search(with_defaults(asked, model, devices, fits_itself=fits_itself), theirs)
    shares = (_shared(outcome),) if asked.n_parallel is None else ()
    if not fits_itself or asked.split_mode == "tensor" or isinstance(outcome, Refused) or _leaves_margin(outcome):
        return Versus(YOURS, text, outcome, shares)
    rooms = _rooms(devices, machine, theirs) or []
    changed = fit(asked, [device.name for device in devices], [room - FIT_MARGIN_BYTES for room in rooms])
    if changed is None:
        note = "its --fit is on, but cannot be asked here what it would change: this is without it"
        return Versus(YOURS, text, outcome, (note, *shares))
    outcome = search(with_defaults(changed.request, model, devices, fits_itself=True), theirs)
    return Versus(YOURS, text, outcome, (_fit_note(changed), *shares))


def of_fit(
    asked: PlanRequest, plan: PlanOutcome, model: ModelFacts, machine: Machine, policy: Policy, search: Search, fit: Fit
) -> Versus:
    """Return what ``llama-fit-params`` chooses for the question that ``plan`` answers, under the same budgets.

    Raises InvalidRequest where it cannot be asked.
    """
    own = {name: getattr(asked, name) for name in _LEFT_TO_FIT}
    request = replace(plan.request, **own, n_ctx_per_slot=None, n_ctx=_promised_context(asked, plan.request, policy))
    devices = _devices(request, machine)
    if not devices:
        raise InvalidRequest("--versus fit: there is no device that it could place anything on")
    changed = fit(request, [device.name for device in devices], _rooms(devices, machine, policy) or [])
    if changed is None:
        raise InvalidRequest("--versus fit: no answer; llama-fit-params has to lie beside the llama-server in use")
    if changed.gave_up:
        raise InvalidRequest("--versus fit: llama-fit-params finds no way to fit this model")
    outcome = search(with_defaults(changed.request, model, devices, fits_itself=True), policy)
    return Versus(ITS_FIT, changed.flags, outcome)


def _promised_context(asked: PlanRequest, settled: PlanRequest, policy: Policy) -> int | None:
    """Return the context over all slots that flags or settings promise, None where it is free."""
    if asked.n_ctx is not None:
        return asked.n_ctx if isinstance(asked.n_ctx, int) else None
    per_slot = asked.n_ctx_per_slot or policy.n_ctx_per_slot
    return None if per_slot is None else per_slot * settled.slots


def with_defaults(
    request: PlanRequest, model: ModelFacts, devices: Sequence[Device], *, fits_itself: bool
) -> PlanRequest:
    """Return the request with llama-server's own default for everything that decides where memory goes."""
    if request.n_parallel is None:
        request = replace(request, n_parallel=N_PARALLEL, kv_unified=True)
    trained = model.hparams.n_ctx_train or context.N_BATCH
    streams = 1 if request.kv_unified or not fits_itself else request.slots  # common/fit.cpp
    n_ctx = request.n_ctx if isinstance(request.n_ctx, int) and request.n_ctx else trained * streams
    defaults: dict[str, Any] = {
        "kv_unified": False,
        "devices": tuple(str(device.name) for device in devices),
        "n_gpu_layers": "all",
        # src/llama-model.cpp, load_tensors: by what is free
        "tensor_split": tuple(float(device.free_bytes or 1) for device in devices) or None,
        "n_batch": context.N_BATCH,
        "n_ubatch": context.N_UBATCH,
        "flash_attn": "auto",
        "cache_type_k": "f16",
        "cache_type_v": "f16",
        "cache_ram_mib": context.CACHE_RAM_MIB,
        "split_mode": "layer",
    }
    opened = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    if request.n_ctx_per_slot is not None:
        return replace(request, **opened)
    return replace(request, **opened, n_ctx=n_ctx)


def _read(text: str, model: ModelFacts) -> tuple[list[str], PlanRequest]:
    """Return the words and what they ask of the model. Raises InvalidRequest for those of another model, or of ours."""
    try:
        words = shlex.split(text)
        line = flags.parse(words)
    except (ValueError, InvalidRequest) as error:
        raise InvalidRequest(f"--versus: {error}") from None
    other = {_file(path) for path in line.options.models} - {_file(model.summary.path)}
    if replace(line.options, models=()) != flags.Options() or other or line.request.rpc:
        raise InvalidRequest("--versus takes llama-server's flags; model and machine are those of the plan beside it")
    asked = line.request_of(line.request.role)
    return words, replace(asked, n_parallel=None) if asked.n_parallel == "auto" else asked  # to it they are the same


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _devices(request: PlanRequest, machine: Machine) -> list[Device]:
    names = None if request.devices is None else [name.lower() for name in request.devices]
    usable = {device.name.lower(): device for device in machine.devices if device.usable}
    if names is None:
        return list(usable.values())
    if missing := [name for name in names if name not in usable]:
        raise InvalidRequest(f"--versus: --device {missing[0]}: no such device here")
    return [usable[name] for name in names]


def _rooms(devices: Sequence[Device], machine: Machine, policy: Policy) -> list[int] | None:
    """Return what a runner's buffers may fill on each of these devices, None where that is not known of all."""
    limits = budgets(machine, policy)
    known = [(limits.of(device.name), overhead_bytes(device)) for device in devices]
    rooms = [limit - overhead for limit, overhead in known if limit is not None]
    return rooms if len(rooms) == len(devices) else None


def _leaves_margin(outcome: PlanOutcome) -> bool:
    """Say whether ``--fit`` would change nothing (common/fit.cpp, common_params_fit_impl)."""
    if not isinstance(outcome, Plan):
        return False
    rooms = [usage.headroom_bytes for usage in outcome.usages if usage.kind is not DeviceKind.HOST]
    return all(room is None or room >= FIT_MARGIN_BYTES for room in rooms)


def _fit_note(changed: Fitted) -> str:
    if not changed.gave_up:
        return f"its --fit would change them to: {changed.flags}"
    context_only = f", but for the context: {changed.flags}" if changed.flags else ""
    return f"its --fit finds no way to make room and changes nothing{context_only}"


def _shared(outcome: PlanOutcome) -> str:
    """Say what llama-server does with conversations where nobody told it how many there are."""
    return f"its {outcome.request.n_parallel} conversations share one cache: one of them alone can have all of it"
