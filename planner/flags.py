"""Command lines read and written: words to a request, and a request to llama-server's words.

As with llama-server: no abbreviations, a value is a word of its own, and ``_`` in a long name counts as ``-``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from planner import adapters, overrides
from planner.errors import InvalidRequest
from planner.flag_table import BY_NAME, FLAGS, Flag
from planner.llama_flags import LEFT_OUT, PASSED_ON, REFUSED, UNCOUNTED
from planner.speculation import LOOKUP_FLAGS, NONE
from planner.types.request import PlanRequest, Role

PROGRAM: Final = "llama-server"
_ASSIGNMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True, slots=True)
class Options:
    """What ``planner explain`` was asked beside the request: the files, and the machine to imagine.

    ``what_if`` are the words ``NAME=SIZE`` and ``cards`` those of ``--gpu``, as written and in order; ``machine`` is
    the file of another machine. ``versus`` are the flags to compare with, as they were written; ``require`` is "gpu"
    where nothing may stay on the host.
    """

    models: tuple[str, ...] = ()
    versus: str | None = None
    require: str | None = None
    what_if: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()
    machine: str | None = None
    host_memory: str | None = None
    no_gpu: bool = False
    no_oracle: bool = False
    json: bool = False


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line, read. ``notes`` are lines for the reader on flags that are handed on."""

    request: PlanRequest
    options: Options
    notes: tuple[str, ...] = ()

    def request_of(self, role: Role) -> PlanRequest:
        """Return what is asked of a model of this role. The workers of ``--rpc`` are devices of the machine by then."""
        request = replace(self.request, rpc=None)
        return request if request.embeddings or request.reranking else replace(request, role=role)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

# Flags with patterns, and for each the three that add patterns for the CPU to the same list (a draft has but two).
_TO_CPU: Final[Mapping[str, tuple[str, str, str]]] = {
    "override_tensor": ("cpu_moe", "n_cpu_moe", "n_cpu_ffn"),
    "override_tensor_draft": ("cpu_moe_draft", "n_cpu_moe_draft", ""),
}


@dataclass(slots=True)
class _Reading:
    """What has been read so far."""

    values: dict[str, Any] = field(default_factory=dict)
    passthrough: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, flag: Flag, value: Any) -> None:
        if flag.dest in _TO_CPU:
            value = self._in_order(flag.dest, value)
        if flag.dest == "spec_type":
            value = self._with_earlier(value)
        if flag.gathers:
            value = (*self.values.get(flag.dest, ()), *value)
        self.values[flag.dest] = value

    def _with_earlier(self, kinds: str) -> str:
        """Return these kinds of speculation behind the earlier ones: they add up, and ``none`` takes none away."""
        given = [words for words in (self.values.get("spec_type"), kinds) if words and NONE not in words.split(",")]
        return ",".join(given) or NONE

    def _in_order(self, dest: str, patterns: Sequence[overrides.Override]) -> tuple[overrides.Override, ...]:
        """Return these patterns after those that ``-cmoe`` and its like have made so far: the first match wins."""
        get, flags = self.values.get, _TO_CPU[dest]
        to_cpu = overrides.to_cpu(cpu_moe=get(flags[0]), n_cpu_moe=get(flags[1]), n_cpu_ffn=get(flags[2]))
        there = self.values.get(dest, ())
        return overrides.ahead([pair for pair in to_cpu if pair not in there], patterns)


def parse(words: Sequence[str]) -> CommandLine:
    """Return what these words ask for. Raises InvalidRequest: what is wrong, and what is allowed."""
    reading = _Reading()
    rest = iter(_without_program(words))
    for word in rest:
        if not word.startswith("-") or word == "-":
            _put_model(reading, word)
            continue
        name = word.replace("_", "-") if word.startswith("--") and "=" not in word else word
        if (flag := BY_NAME.get(name)) is not None:
            _read_flag(reading, flag, name, rest)
        elif name in PASSED_ON:
            _pass_on(reading, name, rest)
        elif name in LEFT_OUT:
            _leave_out(reading, name, rest)
        else:
            raise InvalidRequest(_unknown(name))
    return _finish(reading)


def _without_program(words: Sequence[str]) -> Sequence[str]:
    """Return the words of a pasted command line after its program, and after what it sets in the environment."""
    first = next((i for i, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    is_program = first < len(words) and words[first].rpartition("/")[2] == PROGRAM
    return words[first + 1 :] if is_program else words


def _put_model(reading: _Reading, word: str) -> None:
    reading.values["models"] = tuple(dict.fromkeys((*reading.values.get("models", ()), word)))


def _read_flag(reading: _Reading, flag: Flag, name: str, rest: Iterator[str]) -> None:
    if flag.parse is None:
        reading.put(flag, name in flag.on)
        return
    value = _next(rest, name, flag.metavar)
    if flag.dest == "devices" and "=" in value:
        reading.values["what_if"] = (*reading.values.get("what_if", ()), *value.split(","))
    elif flag.dest == "models":
        _put_model(reading, value)
    else:
        try:
            reading.put(flag, flag.parse(value))
        except ValueError as error:
            if value in BY_NAME or value in PASSED_ON or value in LEFT_OUT:
                raise InvalidRequest(f"{name} needs a value: {name} {flag.metavar}; {value} follows it") from None
            raise InvalidRequest(f"{name} {value}: expected {error}") from None


def _pass_on(reading: _Reading, name: str, rest: Iterator[str]) -> None:
    reading.passthrough += [name, *(_next(rest, name, "VALUE") for _ in range(PASSED_ON[name]))]
    if name in UNCOUNTED:
        reading.notes.append(f"{name} is handed to llama-server; the memory that it takes is not in these figures")
    elif name not in LOOKUP_FLAGS | adapters.COUNTED_FLAGS:
        reading.notes.append(f"{name} moves no memory; it is handed to llama-server as it is")


def _leave_out(reading: _Reading, name: str, rest: Iterator[str]) -> None:
    n_values, reason = LEFT_OUT[name]
    for _ in range(n_values):
        _next(rest, name, "VALUE")
    reading.notes.append(f"{name} is left out: {reason}")


def _next(rest: Iterator[str], name: str, metavar: str) -> str:
    value = next(rest, None)
    if value is None:
        raise InvalidRequest(f"{name} needs a value: {name} {metavar}")
    return value


def _unknown(name: str) -> str:
    if (reason := REFUSED.get(name)) is not None:
        return f"{name} is not accepted: {reason}"
    head, equals, value = name.partition("=")
    if equals and head in BY_NAME and BY_NAME[head].parse is None:
        return f"{name}: {head} takes no value"
    if equals and (head in BY_NAME or head in PASSED_ON or head in LEFT_OUT):
        return f"{name}: as with llama-server, the value is a word of its own: {head} {value}"
    import difflib  # noqa: PLC0415 - only a wrong command line pays for it

    near = difflib.get_close_matches(head, [*BY_NAME, *PASSED_ON], n=3)
    return f"{head} is no flag of planner or llama-server" + (f"; near it: {', '.join(near)}" if near else "")


def _finish(reading: _Reading) -> CommandLine:
    values = reading.values
    options = Options(**{f.name: values.pop(f.name) for f in fields(Options) if f.name in values})
    if not any(values.get("tensor_split", (1,))):
        del values["tensor_split"]  # all zero means "not given" (src/llama-model.cpp, load_tensors)
    if values.get("n_gpu_layers") == "auto":
        del values["n_gpu_layers"]
    _keep_one_context(reading)
    request = PlanRequest(role=_role(values), passthrough=tuple(reading.passthrough), **values)
    _refuse_contradictions(request, options)
    return CommandLine(request, options, tuple(reading.notes))


def _keep_one_context(reading: _Reading) -> None:
    """Where ``-c`` says how much all slots share, the context of one only caps it (tools/server/server.cpp)."""
    values = reading.values
    if "n_ctx" not in values or "n_ctx_per_slot" not in values:
        return
    if values["n_ctx"] == "auto":
        del values["n_ctx"]
        return
    cap = values.pop("n_ctx_per_slot")
    reading.passthrough += ["--kv-unified-per-slot", str(cap)]
    reading.notes.append(f"-c says what is reserved; of it a conversation gets {cap:,} tokens at most")


def _role(values: Mapping[str, Any]) -> Role:
    if values.get("reranking") or (values.get("embeddings") and values.get("pooling") == "rank"):
        return Role.RERANK
    return Role.EMBEDDING if values.get("embeddings") else Role.CHAT


def _refuse_contradictions(request: PlanRequest, options: Options) -> None:
    what_if = next((f"--device {word}" for word in options.what_if), None)
    imagined = what_if or next((f"--gpu {card}" for card in options.cards), None)
    on_gpu = f"-ngl {request.n_gpu_layers}" if request.n_gpu_layers not in {None, 0} else "--device"
    contradictions = (
        (options.no_gpu and imagined, f"--no-gpu and {imagined}: with or without GPUs?"),
        (
            options.no_gpu and (request.devices or request.n_gpu_layers not in {None, 0}),
            f"--no-gpu and {on_gpu}: there is no GPU to put layers on",
        ),
        (
            what_if and request.devices is not None,
            f"{what_if} imagines a machine, --device A,B chooses on this one: use one of them",
        ),
        (
            options.machine and (imagined or options.no_gpu),
            f"--machine and {imagined or '--no-gpu'}: the file says which devices there are",
        ),
        (
            request.reranking and request.pooling not in {None, "rank"},
            f"--reranking and --pooling {request.pooling}: reranking pools by rank",
        ),
    )
    for wrong, line in contradictions:
        if wrong:
            raise InvalidRequest(line)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(request: PlanRequest) -> tuple[str, ...]:
    """Return llama-server's words for every knob that is set, in the order of the table, passed-on flags last."""
    words: list[str] = []
    for flag in FLAGS:
        value = None if flag.ours or not flag.launch else getattr(request, flag.dest)
        if value is not None:
            words += flag.words(value)
    return (*words, *request.passthrough)


def as_json(request: PlanRequest) -> dict[str, Any]:
    """Return every knob by its name, None where llama-server decides; in the order of the table."""
    knobs = {flag.dest: getattr(request, flag.dest) for flag in FLAGS if not flag.ours}
    return {"role": request.role.value, **knobs, "passthrough": request.passthrough}
