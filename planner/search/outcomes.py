"""A search's last candidate as its outcome: a plan, that nothing fits, or that llama.cpp has to place it itself."""

from __future__ import annotations

from dataclasses import replace

from planner import budget, launch, refusals, speculation, speed
from planner.build import is_pinned
from planner.model import ModelFacts
from planner.search import knobs
from planner.search.candidates import Accountant, Candidate, effective
from planner.types.machine import Device, DeviceKind, LlamaBuild
from planner.types.plan import Decision, NoFit, Placement, Plan
from planner.types.usage import UNKNOWN_DETAIL, UNKNOWN_FIGURE


def plan(accountant: Accountant, found: Candidate, decisions: tuple[Decision, ...], warnings: tuple[str, ...]) -> Plan:
    """Return the plan that a candidate is."""
    request = effective(found)
    used = [accountant.machine.device(name) for name in found.placement.devices]
    return Plan(
        model=accountant.model.summary,
        request=request,
        build=accountant.build,
        placement=found.placement,
        usages=found.usages,
        host=found.ledger.host_detail,
        n_ctx_per_slot=per_slot(accountant.model, found),
        launch=launch.spec(accountant.model.summary.path, request, accountant.machine, accountant.build),
        decode=speed.decode(accountant.model, found.params, found.placement, accountant.machine),
        decisions=decisions,
        warnings=warnings + _unknown_figures(accountant, found) + _plan_warnings(accountant.model, found, used),
    )


def _unknown_figures(accountant: Accountant, found: Candidate) -> tuple[str, ...]:
    """Return a line that names the figures which are not known, and why; none where all are."""
    everyone = (*found.ledger.devices, found.ledger.host)
    parts = {
        "weights": any(row.model.bytes is None for row in everyone),
        "context": any(row.context.bytes is None for row in everyone),
        "compute": any(row.compute.bytes is None for row in everyone),
    }
    unknown = [part for part, is_unknown in parts.items() if is_unknown]
    if not unknown:
        return ()
    return (f"how much {' and '.join(unknown)} takes is unknown: {_why_unknown(accountant, found)}; leave room for it",)


def _why_unknown(accountant: Accountant, found: Candidate) -> str:
    asked = "llama.cpp could not say" if accountant.oracle else "llama.cpp was not asked (--no-oracle, or none to ask)"
    return f"there is no rule here for {', '.join(found.ledger.not_built)}, and {asked}"


def no_fit(
    accountant: Accountant, found: Candidate, decisions: tuple[Decision, ...], warnings: tuple[str, ...]
) -> NoFit:
    """Return that the model does not fit, with the candidate that comes nearest."""
    return NoFit(
        model=accountant.model.summary,
        request=effective(found),
        build=accountant.build,
        usages=found.usages,
        host=found.ledger.host_detail,
        n_ctx_per_slot=per_slot(accountant.model, found),
        causes=found.shortfalls,
        decisions=decisions,
        warnings=warnings + _cut_context(accountant.model, found),
    )


def per_slot(model: ModelFacts, found: Candidate) -> int:
    """Return the tokens that one conversation is sure of (tools/server/server-context.cpp, ``n_ctx_slot``)."""
    params = found.params
    guaranteed = params.n_ctx_seq // params.n_seq_max if params.kv_unified else params.n_ctx_seq
    if knobs.needs_whole_text(model, found.request):
        guaranteed = min(guaranteed, params.n_ubatch)
    return min(guaranteed, model.hparams.n_ctx_train or guaranteed)


def left_to_llama(
    accountant: Accountant,
    found: Candidate,
    decisions: tuple[Decision, ...],
    warnings: tuple[str, ...],
    *,
    keeps_context: bool,
) -> Plan:
    """Return a plan whose bytes nobody knows: llama.cpp's own fit places it within our budgets."""
    devices = tuple(str(device.name) for device in accountant.devices)
    request = replace(
        found.request,
        devices=devices,
        n_ctx=found.params.n_ctx_unpadded if keeps_context else None,
        n_ctx_per_slot=None,
    )
    margins = [(device.free_bytes or 0) - (accountant.limits.of(device.name) or 0) for device in accountant.devices]
    unknown = tuple(
        replace(row, model=UNKNOWN_FIGURE, context=UNKNOWN_FIGURE, compute=UNKNOWN_FIGURE, layers=(), output=False)
        if row.name in devices or row.kind is DeviceKind.HOST
        else row
        for row in found.usages
    )
    return Plan(
        model=accountant.model.summary,
        request=request,
        build=accountant.build,
        placement=Placement(devices, (), -1, 0, ()),
        usages=unknown,
        host=UNKNOWN_DETAIL,
        n_ctx_per_slot=per_slot(accountant.model, found) if keeps_context else None,
        launch=launch.spec(
            accountant.model.summary.path, request, accountant.machine, accountant.build, fit_margins=margins
        ),
        decisions=decisions,
        warnings=(*warnings, f"every figure is unknown: {_why_unknown(accountant, found)}"),
        fit_by_llama=True,
    )


def build_warnings(build: LlamaBuild) -> tuple[str, ...]:
    """Return what a reader should know of the llama-server that the plan is made for."""
    if build.path is None:
        return ("no llama-server was found: the plan is made for the pinned llama.cpp",)
    if not is_pinned(build):
        return (
            f"{build.path} is another llama.cpp ({build.commit}) than the formulas are exact for: they are estimates",
        )
    return ()


def _plan_warnings(model: ModelFacts, found: Candidate, used: list[Device]) -> tuple[str, ...]:
    """Return what a reader of the plan should know beside its figures."""
    warnings = []
    if reason := refusals.aborts(model, found.params):
        warnings.append(reason)
    if missing := launch.unaddressed(used):
        warnings.append(
            f"{', '.join(missing)}: no address is known, so the command line has no --rpc; give NAME@HOST:PORT=SIZE"
        )
    if blind := [row.name for row in found.usages if row.planned_bytes and row.free_bytes is None]:
        warnings.append(f"{', '.join(blind)}: how much is free is not known, so nothing was held against it")
    if reason := budget.host_warning(found.usages[-1], found.ledger.host_detail):
        warnings.append(reason)
    if found.request.model_draft and not speculation.types(found.request):
        warnings.append("no --spec-type uses the draft model: llama-server loads it and frees it again")
    if _draft_is_left_behind(model, found):
        warnings.append("the draft model is on the host, as the model is: --device-draft puts it on a device")
    return (*warnings, *_cut_context(model, found))


def _draft_is_left_behind(model: ModelFacts, found: Candidate) -> bool:
    """Say whether a draft is on the host for no other reason than that the model has no devices."""
    request, wanted = found.request, found.request.n_gpu_layers_draft
    asked = request.devices == () or wanted == 0 or request.devices_draft is not None
    others = any(row.kind is not DeviceKind.HOST for row in found.usages)
    return model.draft is not None and others and not found.placement.devices and not asked


def _cut_context(model: ModelFacts, found: Candidate) -> tuple[str, ...]:
    """Return a line for each bound that leaves a slot less than its share of the context."""
    has, trained, whole = found.params.n_ctx_seq, model.hparams.n_ctx_train, found.params.n_ubatch
    lines = []
    if trained is not None and has > trained:
        lines.append(f"a slot uses {trained:,} tokens of its {has:,}: the model was trained for no more")
    if knobs.needs_whole_text(model, found.request) and whole < min(has, trained or has):
        lines.append(f"a text has {whole:,} tokens at most, not {has:,}: it has to pass in one micro-batch")
    return tuple(lines)
