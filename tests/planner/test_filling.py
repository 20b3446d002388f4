"""Where devices can be filled by arithmetic, a way to do so is found: all ways are looked at."""

from __future__ import annotations

from itertools import chain, combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exhaust import N_CTX, REQUEST, TYPES, Cards, Layers, cards

from planner import budget
from planner.context import context_params
from planner.search import knobs
from planner.search.filling import Filling, bytes_of, fillings
from planner.search.learned import Learned
from planner.search.problems import Question
from planner.types import Policy

MATRICES = ("down", "gate", "up")
SUBSETS = tuple(chain.from_iterable(combinations(MATRICES, count) for count in range(len(MATRICES) + 1)))


def fits(question: Question, filling: Filling) -> bool:
    """Add up what each device then holds."""
    held, start = [0] * len(question.devices), 0
    for index, count in enumerate(filling.counts):
        held[index] = sum(question.sizes(question.devices[index])[start : start + count])
        for sent in (each for each in filling.sent if start <= each.slot < start + count):
            target = [device.name for device in question.devices].index(sent.device)
            held[index] -= bytes_of(question, index, sent.slot, sent.matrices)
            held[target] += bytes_of(question, target, sent.slot, sent.matrices)
        start += count
    rooms = [question.limits.of(device.name) or 0 for device in question.devices]
    return start == question.n_slots and all(size <= room for size, room in zip(held, rooms, strict=True))


def can_be_filled(question: Question) -> bool:
    """Go through all devices used, all cuts and all that may go on where one device follows on another."""
    n_slots, everyone = question.n_slots, range(len(question.devices))
    for count in range(1, len(everyone) + 1):
        for used, cuts in product(combinations(everyone, count), combinations(range(1, n_slots), count - 1)):
            runs = list(pairwise((0, *cuts, n_slots)))
            for gone in product(SUBSETS, repeat=count - 1):
                held = [
                    sum(question.sizes(question.devices[index])[start:end])
                    for index, (start, end) in zip(used, runs, strict=True)
                ]
                for place, matrices in enumerate(gone):
                    slot = runs[place][1] - 1
                    held[place] -= bytes_of(question, used[place], slot, matrices)
                    held[place + 1] += bytes_of(question, used[place + 1], slot, matrices)
                rooms = [question.limits.of(question.devices[index].name) or 0 for index in used]
                if all(size <= room for size, room in zip(held, rooms, strict=True)):
                    return True
    return False


@settings(max_examples=60)
@given(
    types=st.lists(st.tuples(TYPES, TYPES, TYPES), min_size=2, max_size=4),
    output=TYPES,
    where=cards(most=4),
)
def test_a_filling_is_found_wherever_there_is_one(
    types: list[tuple[str, str, str]], output: str, where: Cards, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = Layers(tuple(types), output, 8).write(tmp_path_factory.getbasetemp() / "filling.gguf")
    machine = where.machine(model)
    settled, _ = knobs.settle(model, REQUEST, Policy(), machine.devices)
    params = context_params(model, knobs.with_context(settled, N_CTX))
    limits = budget.budgets(machine, Policy())
    question = Question(model, params, machine, machine.devices, limits, Learned())
    found = next(fillings(question), None)
    assert (found is not None) == can_be_filled(question)
    assert found is None or fits(question, found)
