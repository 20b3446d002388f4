"""What a device took in one split is told of others in which it plays the same role, and rules out none that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import assume, given, settings
from test_exhaust import N_CTX, REQUEST, Cards, Layers, cards, models

from planner import budget
from planner.build import PINNED_BUILD
from planner.search import knobs
from planner.search.candidates import Accountant
from planner.search.learned import Mode
from planner.search.optimizer import Optimizer
from planner.search.problems import Question
from planner.search.roles import SPREAD_BYTES, Roles
from planner.search.solver import Solver
from planner.search.splits import Split
from planner.types import DeviceUsage, Policy

MOST_SPLITS = 8  # of each subproblem: each is accounted for

Seen = list[tuple[Mode, Split, tuple[DeviceUsage, ...]]]


def some_splits(layers: Layers, where: Cards, factory: pytest.TempPathFactory) -> tuple[Question, Seen]:
    """Return the fastest splits of every mode that weights and caches allow, with what devices take in each."""
    model = layers.write(factory.getbasetemp() / "roles.gguf")
    machine = where.machine(model)
    limits = budget.budgets(machine, Policy())
    settled, _ = knobs.settle(model, REQUEST, Policy(), machine.devices)
    request = knobs.with_context(settled, N_CTX)
    accountant = Accountant(model, machine, limits, PINNED_BUILD, None, machine.devices, spread=False)
    optimizer = Optimizer(accountant, machine.devices, order_is_pinned=False)
    question = optimizer.question(request, told=False)
    seen = [
        (subproblem.mode, split, optimizer.accounted(request, subproblem.mode, split).candidate.usages)
        for tier in optimizer.tiers(question, request)
        for subproblem in tier
        for split in islice(Solver(subproblem.problem).splits(lambda _: False), MOST_SPLITS)
        if split.segments
    ]
    return question, seen


def roles_within(question: Question, budgets: Mapping[str, int | None], seen: Seen) -> Roles:
    """Return what these splits teach where devices have these budgets."""
    roles = Roles(replace(question, limits=budget.Budgets(budgets, {})))
    for mode, split, usages in seen:
        roles.learn(mode, split, usages)
    return roles


@settings(max_examples=25)
@given(layers=models(most=5), where=cards(most=3))
def test_a_split_that_has_what_it_takes_is_not_ruled_out_by_others(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    question, seen = some_splits(layers, where, tmp_path_factory)
    assume(len(seen) > 1)
    for mode, split, usages in seen:
        roles = roles_within(question, {row.name: row.known_bytes for row in usages}, seen)
        assert not roles.overruns(mode, split)


@settings(max_examples=25)
@given(layers=models(most=5), where=cards(most=3))
def test_a_split_that_lacks_more_than_buffers_differ_by_is_ruled_out_once_it_was_seen(
    layers: Layers, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    question, seen = some_splits(layers, where, tmp_path_factory)
    assume(seen)
    for mode, split, usages in seen:
        less = {row.name: row.known_bytes - SPREAD_BYTES - 1 for row in usages}
        assert roles_within(question, less, [(mode, split, usages)]).overruns(mode, split)
