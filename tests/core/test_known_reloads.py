"""What makes a loaded model be loaded again for a request, and what does not: Ollama's cases, and what it lacked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from making_plans import Bench, granted, make_plan
from tiny_machine import ANY, Shop

from planner.types import LoadOptions
from supervisor.core.commands import PlanModel, Spawn
from supervisor.core.events import SettingsChanged
from supervisor.core.runner import RunnerState
from supervisor.core.types import NO_OPTIONS, ModelId, ModelSettings

A = ModelId("a")
LOADED = LoadOptions(n_ctx=4096, n_gpu_layers=10, main_gpu=0, n_batch=512, use_mmap=True)  # what the planner chose


def loaded(options: LoadOptions = NO_OPTIONS, serves: LoadOptions = LOADED) -> Bench:
    """Return a bench whose model was loaded for a request of these options, which is served."""
    bench = Bench(ANY)
    bench.arrive(A, options=options)
    bench.answer(make_plan(serves=serves))
    bench.finish_load(A)
    bench.finish(A)
    return bench


@pytest.mark.parametrize(
    "options",
    [
        NO_OPTIONS,
        LOADED,
        LoadOptions(n_ctx=2048),
        LoadOptions(n_gpu_layers=11),
        *(replace(NO_OPTIONS, **{name: getattr(LOADED, name)}) for name in ("n_batch", "main_gpu", "use_mmap")),
    ],
)
def test_what_a_runner_has_already_it_is_not_loaded_again_for(options: LoadOptions) -> None:
    """A request that says nothing takes what there is; Ollama compares the default context instead, and reloads.

    A shorter context is served by a longer one, and more layers than there are by all of them.
    """
    bench = loaded()
    ticket = bench.arrive(A, options=options)
    assert (granted(bench.commands), bench.pool.loads) == ([ticket], {})


@pytest.mark.parametrize(
    "options",
    [
        LoadOptions(n_ctx=8192),
        LoadOptions(n_batch=256),
        LoadOptions(n_gpu_layers=9),
        LoadOptions(n_gpu_layers=0),
        LoadOptions(main_gpu=1),
        LoadOptions(use_mmap=False),
    ],
)
def test_what_a_runner_does_not_have_it_is_loaded_again_for_once(options: LoadOptions) -> None:
    bench = loaded()
    ticket = bench.arrive(A, options=options)
    assert bench.one(PlanModel).options == options
    serves = replace(LOADED, **{name: value for name, value in _said(options).items() if value is not None})
    bench.answer(make_plan(serves=serves))
    assert bench.state(A) is RunnerState.STOPPING
    bench.exit(A)
    bench.answer(make_plan(serves=serves))
    assert granted(bench.finish_load(A)) == [ticket]
    bench.finish(A)
    again = bench.arrive(A, options=options)
    assert granted(bench.commands) == [again]


def _said(options: LoadOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in ("n_ctx", "n_batch", "n_gpu_layers", "main_gpu", "use_mmap")}


@pytest.mark.parametrize("options", [LoadOptions(n_ctx=1 << 20), NO_OPTIONS])
def test_a_context_that_was_cut_to_what_the_model_has_is_not_asked_for_again(options: LoadOptions) -> None:
    """Neither by who asked for too much nor by who is told how much there is."""
    bench = loaded(options)
    for again in (options, LoadOptions(n_ctx=4096)):
        ticket = bench.arrive(A, options=again)
        assert granted(bench.commands) == [ticket]
        bench.finish(A)
    assert bench.pool.runner(A).generation == 1


def test_all_that_the_operator_or_a_modelfile_says_of_a_launch_is_loaded_anew_after_the_first_has_finished() -> None:
    """Adapters and projectors are among that; a request cannot name them. The core only sees that it is another."""
    bench = Bench(ANY)
    bench.bring_up(A)
    bench.post(SettingsChanged({A: ModelSettings(launch=("--lora", "a.gguf"))}))
    ticket = bench.arrive(A)
    assert (bench.state(A), granted(bench.commands)) == (RunnerState.DRAINING, [])
    bench.finish(A)
    bench.exit(A)
    assert bench.one(PlanModel).launch == ("--lora", "a.gguf")
    bench.answer(make_plan())
    assert granted(bench.finish_load(A)) == [ticket]


def test_two_models_are_two_runners_whatever_their_names() -> None:
    """Which names stand for the same files, and so share a runner, is not the core's to know: they come as one."""
    bench = Bench(ANY)
    bench.load_idle(ModelId("one:latest"))
    bench.arrive(ModelId("one:3b"))
    assert bench.one(PlanModel).model == "one:3b"


def test_two_requests_that_want_different_loads_get_one_after_the_other_in_their_order() -> None:
    bench = Shop()
    bench.load(A, busy=True)
    few, fewer = (
        bench.arrive(A, options=LoadOptions(n_gpu_layers=5)),
        bench.arrive(A, options=LoadOptions(n_gpu_layers=3)),
    )
    served = []
    for _ in range(2):
        bench.plan()
        bench.finish(A)
        bench.exit(A)
        bench.plan()
        assert bench.one(Spawn).plan.serves.n_gpu_layers == (3 if served else 5)
        served += granted(bench.finish_load(A))
    assert served == [few, fewer]


def test_a_longer_context_comes_under_continuous_load_too() -> None:
    """Requests for the shorter one never cease, and do not starve it: a free slot is not given to who came later."""
    bench = Shop(n_parallel=2)
    bench.load(A, busy=True)
    longer = bench.arrive(A, options=LoadOptions(n_ctx=8192))
    for _ in range(10):
        bench.plan()
        bench.arrive(A)
        assert granted(bench.commands) == []
    assert bench.pool.runner(A).in_flight == 1, "a slot is free"
    bench.finish(A)
    bench.exit(A)
    bench.plan()
    assert bench.one(Spawn).plan.serves.n_ctx == 8192
    assert granted(bench.finish_load(A))[0] == longer
