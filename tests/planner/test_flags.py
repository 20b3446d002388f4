"""Flags are read as llama-server reads them, and everything wrong is one clear line."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from requests_strategy import plan_requests

from planner import flag_table, flags
from planner.errors import InvalidRequest
from planner.flag_values import MAX_INT
from planner.llama_flags import LEFT_OUT, PASSED_ON, REFUSED, UNCOUNTED
from planner.types import PlanRequest, Role

NAMES = re.compile(r"(-{1,2}[A-Za-z0-9][\w.-]*)(,\s*)?")


def flags_of_llama_server(tools: Path) -> set[str]:
    """Return every spelling that the built llama-server's help lists."""
    command = [str(tools / "llama-server"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    names = set()
    for line in text.splitlines():
        more = line.startswith("-") and not line.startswith("-----")
        while more and (match := NAMES.match(line)) is not None:
            names.add(match[1])
            line, more = line[match.end() :], match[2] is not None  # noqa: PLW2901 - the rest of this line
    return names


@pytest.mark.llama
def test_every_flag_of_llama_server_is_planned_passed_on_or_refused(llama_tools: Path) -> None:
    """No flag of the pinned build is unknown here, and none is in two tables."""
    theirs = flags_of_llama_server(llama_tools) - {"-h", "--help", "--version"}
    planned = {name for name, flag in flag_table.BY_NAME.items() if not flag.ours}
    removed = {"--mmap", "--no-mmap", "--mlock", "--direct-io", "--no-direct-io"}
    ours = planned | set(PASSED_ON) | set(LEFT_OUT) | set(REFUSED) - removed
    assert theirs - {"-m", "--model"} == ours
    assert not planned & set(PASSED_ON)
    assert not (planned | set(PASSED_ON)) & (set(LEFT_OUT) | set(REFUSED))
    assert not set(LEFT_OUT) & set(REFUSED)
    assert set(PASSED_ON) > UNCOUNTED


def test_every_knob_of_a_request_has_a_flag() -> None:
    """The table and the request name the same knobs; role and passed-on flags are no flags of their own."""
    knobs = {f.name for f in fields(PlanRequest)} - {"role", "passthrough"}
    assert {flag.dest for flag in flag_table.FLAGS if not flag.ours} == knobs
    ours = {flag.dest for flag in flag_table.FLAGS if flag.ours}
    assert ours == {f.name for f in fields(flags.Options)} - {"what_if"}


@given(plan_requests())
def test_what_is_written_is_read_back(request: PlanRequest) -> None:
    """Writing a request as words and reading them gives the request again."""
    assert flags.parse(flags.write(request)).request == request


@given(
    st.lists(
        st.sampled_from(
            [*flag_table.BY_NAME, *PASSED_ON, *LEFT_OUT, *REFUSED, "x", "1", "auto", "RPC0=1GiB", "--", "-", "=", "é"]
        )
    )
)
def test_any_words_are_read_or_named_as_wrong(words: list[str]) -> None:
    """No sequence of words ends in anything but a request or one line that says what is wrong."""
    complaint = "none"
    try:
        flags.parse(words)
    except InvalidRequest as error:
        complaint = str(error)
    assert complaint
    assert "\n" not in complaint


def test_a_pasted_llama_server_line_is_understood() -> None:
    """Short and long names, switches with both spellings, underscores, and a flag that moves no memory."""
    line = "-m a.gguf --ctx_size 8192 -np 2 -ngl all -ts 3/1 -fa on -no-kvu -nkvo --no-mmproj --top-k 40"
    read = flags.parse([*line.split(), "-ot", "a=CPU", "-ot", "b=CPU"])
    assert read.options.models == ("a.gguf",)
    assert read.request == PlanRequest(
        n_ctx=8192,
        n_parallel=2,
        n_gpu_layers="all",
        tensor_split=(3.0, 1.0),
        flash_attn="on",
        kv_unified=False,
        kv_offload=False,
        override_tensor=(("a", "CPU"), ("b", "CPU")),
        passthrough=("--no-mmproj", "--top-k", "40"),
    )
    assert [note.split()[0] for note in read.notes] == ["--no-mmproj", "--top-k"]


def test_a_device_with_a_size_is_imagined_and_one_without_is_chosen() -> None:
    """--device NAME=SIZE repeats and keeps its order; --device A,B selects."""
    imagined = flags.parse(["m", "--device", "CUDA0=24GiB", "-dev", "RPC0@h:1=8G,CUDA1=1"])
    assert imagined.options.what_if == ("CUDA0=24GiB", "RPC0@h:1=8G", "CUDA1=1")
    assert imagined.request.devices is None
    assert flags.parse(["m", "--device", "CUDA1,CUDA0"]).request.devices == ("CUDA1", "CUDA0")
    assert flags.parse(["m", "--device", "none"]).request.devices == ()


def test_what_means_automatic_pins_nothing() -> None:
    """-ngl auto and shares of zero leave the choice to the planner."""
    assert flags.parse(["-ngl", "auto", "-ts", "0,0"]).request == PlanRequest()


@pytest.mark.parametrize("word", ["-1", "auto"])
def test_slots_are_left_to_the_planner_by_llama_servers_word_and_ours(word: str) -> None:
    """Whatever the settings say of them."""
    assert flags.parse(["-np", word]).request == PlanRequest(n_parallel="auto")


@pytest.mark.parametrize(
    "words, role",
    [
        ("--embeddings", Role.EMBEDDING),
        ("--reranking", Role.RERANK),
        ("--embedding --pooling rank", Role.RERANK),
        ("--pooling mean", Role.CHAT),
    ],
)
def test_the_role_follows_the_flags(words: str, role: Role) -> None:
    assert flags.parse(words.split()).request.role is role


def test_a_llama_server_command_line_can_be_pasted() -> None:
    """Its program and what it sets beforehand fall away, and so does what the supervisor decides, with a note."""
    pasted = "CUDA_VISIBLE_DEVICES=0 /opt/llama/llama-server -m a.gguf -ngl 99 --host 0.0.0.0 --port 80 -v --fit off"
    line = flags.parse(pasted.split())
    assert line.options.models == ("a.gguf",)
    assert line.request == PlanRequest(n_gpu_layers=99)
    assert [note.partition(":")[0] for note in line.notes] == [
        f"{flag} is left out" for flag in ("--host", "--port", "-v", "--fit")
    ]


@pytest.mark.parametrize(
    "words, line",
    [
        ("--ctx 5", "--ctx is no flag of planner or llama-server; near it: "),
        ("--ctx-size=5", "--ctx-size=5: as with llama-server, the value is a word of its own: --ctx-size 5"),
        ("-c", "-c needs a value: -c N|auto"),
        ("-c many", "-c many: expected a whole number from 0, or auto"),
        ("-np 0", "-np 0: expected a whole number from 1, or auto or -1"),
        ("-ctk q3_0", "-ctk q3_0: expected one of f32, f16, bf16"),
        ("-ts 1,x", "-ts 1,x: expected up to 15 proportions with commas, like 3,1"),
        ("-ts nan", "-ts nan: expected up to 15 proportions"),
        ("-ot exps", "-ot exps: expected PATTERN=BUFFER"),
        ("--lora a,,b", "--lora a,,b: expected a list with commas and no empty entry"),
        ("--port", "--port needs a value: --port VALUE"),
        ("--json=1", "--json=1: --json takes no value"),
        ("-fa --device CUDA0=1GiB", "-fa needs a value: -fa on|off|auto; --device follows it"),
        ("--no-mmap", "--no-mmap is not accepted: llama.cpp has removed it; use --load-mode"),
        ("-hf some/model", "-hf is not accepted: nothing is downloaded here"),
        ("a.gguf --require cpu", "--require cpu: expected one of gpu"),
        ("--no-gpu --device CUDA0=1GiB", "--no-gpu and --device CUDA0=1GiB: with or without GPUs?"),
        ("--no-gpu --gpu rtx4090", "--no-gpu and --gpu rtx4090: with or without GPUs?"),
        ("--no-gpu -ngl 5", "--no-gpu and -ngl 5: there is no GPU"),
        ("--device CUDA0=1GiB --device CUDA0", "--device CUDA0=1GiB imagines a machine"),
        ("--reranking --pooling mean", "--reranking and --pooling mean: reranking pools by rank"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        flags.parse(words.split())
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "words, places",
    [
        ("-ot a=RPC0 -cmoe", ["a"]),
        ("-cmoe -ot a=RPC0", ["exps", "a"]),
        ("-ot a=RPC0 -ncmoe 2 -ncffn 1 -ot b=RPC1", ["a", "exps", "ffn_", "b"]),
        ("-cmoe -ot a=RPC0 -ot b=RPC1", ["exps", "a", "b"]),
        ("-cmoe -ot a=CPU", ["a"]),
    ],
)
def test_overrides_keep_the_order_of_the_line(words: str, places: list[str]) -> None:
    """In llama.cpp the first pattern that matches wins, so what is sent to the CPU before stays there."""
    request = flags.parse(words.split()).request
    patterns = [pattern for pattern, _ in request.override_tensor or ()]
    assert len(patterns) == len(places)
    assert all(place in pattern for place, pattern in zip(places, patterns, strict=True))
    assert flags.parse(flags.write(request)).request.override_tensor == request.override_tensor


def test_the_context_of_one_caps_what_the_sum_reserves() -> None:
    line = flags.parse(["-c", "4096", "-np", "4", "--kv-unified-per-slot", "512"])
    assert (line.request.n_ctx, line.request.n_ctx_per_slot) == (4096, None)
    assert line.request.passthrough == ("--kv-unified-per-slot", "512")
    assert any("512 tokens at most" in note for note in line.notes)
    assert flags.parse(["-c", "auto", "--kv-unified-per-slot", "512"]).request.n_ctx_per_slot == 512


@pytest.mark.parametrize("words", ["-ub 0", "-ub -1", "-b -1"])
def test_an_unbounded_batch_is_bounded_by_what_it_is_made_of(words: str) -> None:
    request = flags.parse(words.split()).request
    assert MAX_INT in {request.n_batch, request.n_ubatch}


def test_a_flag_that_the_figures_count_has_no_note() -> None:
    assert flags.parse(["--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", "64"]).notes == ()
    assert flags.parse(["--spec-default", "--lora-scaled", "a.gguf:0.5", "--lora-init-without-apply"]).notes == ()
    assert flags.parse(["--spec-ngram-simple-size-n", "9"]).notes


@pytest.mark.parametrize(
    "words,kinds",
    [
        (["ngram-mod", "none"], "ngram-mod"),
        (["none", "ngram-mod", "ngram-simple"], "ngram-mod,ngram-simple"),
        (["none"], "none"),
    ],
)
def test_kinds_of_speculation_add_up(words: list[str], kinds: str) -> None:
    line = [part for word in words for part in ("--spec-type", word)]
    assert flags.parse(line).request.spec_type == kinds
