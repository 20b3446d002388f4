"""The one flag table: the parser, the launch command and the JSON ``request`` all derive from it.

Spellings are llama-server's (common/arg.cpp of the pinned build), so that a command line which works there can be
pasted here. As there: no abbreviations, a value is a word of its own, and ``_`` in a long name counts as ``-``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final

from planner import overrides
from planner.errors import InvalidRequest
from planner.llama_flags import LEFT_OUT, PASSED_ON, REFUSED, UNCOUNTED
from planner.types import PlanRequest, Role

PROGRAM: Final = "llama-server"
_ASSIGNMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]*=")

MAX_DEVICES: Final = 16  # llama_max_devices(); -ts and -fitt take one entry less (common/arg.cpp)
MAX_SEQUENCES: Final = 256  # LLAMA_MAX_SEQ (src/llama-cparams.h)
MAX_INT: Final = 2**31 - 1  # llama-server reads its numbers with std::stoi

CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
SPLIT_MODES: Final = ("none", "layer", "row", "tensor")
LOAD_MODES: Final = ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
LAZY_MODES: Final = ("on", "auto", "off")
POOLING_TYPES: Final = ("none", "mean", "cls", "last", "rank")


# ---------------------------------------------------------------------------------------------------------------------
# Values: each parser takes the word and returns the value, or raises ValueError with what is allowed.


def _number(low: int, high: int = MAX_INT) -> Callable[[str], int]:
    def parse(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low}" + (f" to {high}" if high < MAX_INT else ""))
        return value

    return parse


def _number_or(words: Mapping[str, Any], low: int) -> Callable[[str], Any]:
    number = _number(low)

    def parse(word: str) -> Any:
        if word in words:
            return words[word]
        try:
            return number(word)
        except ValueError as error:
            raise ValueError(f"{error}, or {' or '.join(words)}") from None

    return parse


def _choice(*allowed: str, also: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], str]:
    def parse(word: str) -> str:
        value = also.get(word, word)
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return parse


def _items(word: str) -> tuple[str, ...]:
    """Split at commas; double quotes protect a comma (common/arg.cpp, ``parse_csv_row``)."""
    items = next(csv.reader([word], strict=False), [])
    if not items or not all(items):
        raise ValueError("a list with commas and no empty entry")
    return tuple(items)


def _join(items: Iterable[str]) -> str:
    return ",".join(f'"{item}"' if "," in item else item for item in items)


def _device_names(word: str) -> tuple[str, ...]:
    return () if word == "none" else _items(word)


def _join_devices(names: Sequence[str]) -> str:
    return ",".join(names) or "none"


def _proportions(word: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in word.replace("/", ",").split(","))
    except ValueError:
        values = (-1.0,)
    if len(values) >= MAX_DEVICES or not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"up to {MAX_DEVICES - 1} proportions with commas, like 3,1")
    return values


def _join_proportions(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" if value != int(value) else str(int(value)) for value in values)


def _tensor_overrides(word: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple((pattern, buffer) for pattern, _, buffer in (part.partition("=") for part in word.split(",")))
    if not all(pattern and buffer for pattern, buffer in pairs):
        raise ValueError("PATTERN=BUFFER, like exps=CPU, more of them with commas")
    return pairs


def _join_overrides(pairs: Iterable[tuple[str, str]]) -> str:
    return ",".join(f"{pattern}={buffer}" for pattern, buffer in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: where its value goes, how it is spelled, read and written.

    ``on`` are the spellings that set a value (or True), ``off`` those that set False; the first of each is the one we
    write. Without ``parse`` it is a switch. ``gathers``: repeated, its values add up, as in llama-server. ``ours``: the
    planner's own flag, which llama-server never sees. ``launch`` False: it has gone into other flags by then.
    """

    dest: str
    on: tuple[str, ...]
    help: str
    off: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    write: Callable[[Any], str] = str
    gathers: bool = False
    ours: bool = False
    launch: bool = True

    def words(self, value: Any) -> tuple[str, ...]:
        """Return the words that set this value on a llama-server command line; none where no spelling exists."""
        if self.parse is not None:
            return (self.on[0], self.write(value))
        names = self.on if value else self.off
        return names[:1]


_AUTO_CONTEXT: Final = {"auto": "auto"}
_AUTO_LAYERS: Final = {"auto": "auto", "all": "all", "-1": "auto", "-2": "all"}
_UNSET: Final = {"auto": None, "-1": None}
_SWITCH_WORDS: Final = {  # common/arg.cpp, is_truthy, is_falsey and is_autoy
    **dict.fromkeys(("1", "true", "enabled"), "on"),
    **dict.fromkeys(("0", "false", "disabled"), "off"),
    "-1": "auto",
}
_TYPES: Final = "|".join(CACHE_TYPES)

# In the order of the launch command: --rpc makes the devices that later flags name, so it comes first.
FLAGS: Final = (
    Flag("rpc", ("--rpc",), "llama.cpp RPC workers", (), "HOST:PORT,...", _items, _join, gathers=True),
    Flag("devices", ("--device", "-dev"), "devices to use, in this order", (), "A,B", _device_names, _join_devices),
    Flag("n_gpu_layers", ("-ngl", "--gpu-layers", "--n-gpu-layers"), "layers on GPUs, counted from the last",
         (), "N|auto|all", _number_or(_AUTO_LAYERS, 0)),
    Flag("tensor_split", ("-ts", "--tensor-split"), "share of the layers of each device",
         (), "N0,N1,...", _proportions, _join_proportions),
    Flag("split_mode", ("-sm", "--split-mode"), "how a model is split over GPUs",
         (), "|".join(SPLIT_MODES), _choice(*SPLIT_MODES)),
    Flag("main_gpu", ("-mg", "--main-gpu"), "the GPU of --split-mode none", (), "INDEX", _number(-1, MAX_DEVICES - 1)),
    Flag("n_ctx", ("-c", "--ctx-size"), "context, the sum over slots; 0: the trained length",
         (), "N|auto", _number_or(_AUTO_CONTEXT, 0)),
    Flag("n_ctx_per_slot", ("--kv-unified-per-slot",), "context of one conversation",
         (), "N", _number(1), launch=False),
    Flag("n_parallel", ("-np", "--parallel"), "slots: conversations at a time",
         (), "N", _number_or(_UNSET, 1)),
    Flag("kv_unified", ("-kvu", "--kv-unified"), "one cache that all slots share", ("-no-kvu", "--no-kv-unified")),
    Flag("n_batch", ("-b", "--batch-size"), "logical batch", (), "N", _number(1)),
    Flag("n_ubatch", ("-ub", "--ubatch-size"), "physical batch", (), "N", _number(1)),
    Flag("flash_attn", ("-fa", "--flash-attn"), "flash attention",
         (), "on|off|auto", _choice("on", "off", "auto", also=_SWITCH_WORDS)),
    Flag("cache_type_k", ("-ctk", "--cache-type-k"), "type of the K cache", (), _TYPES, _choice(*CACHE_TYPES)),
    Flag("cache_type_v", ("-ctv", "--cache-type-v"), "type of the V cache", (), _TYPES, _choice(*CACHE_TYPES)),
    Flag("kv_offload", ("-kvo", "--kv-offload"), "caches on the GPUs", ("-nkvo", "--no-kv-offload")),
    Flag("override_tensor", ("-ot", "--override-tensor"), "tensors whose name matches go to this buffer type",
         (), "PATTERN=BUFFER,...", _tensor_overrides, _join_overrides, gathers=True),
    Flag("cpu_moe", ("-cmoe", "--cpu-moe"), "all experts on the CPU"),
    Flag("n_cpu_moe", ("-ncmoe", "--n-cpu-moe"), "experts of the first N layers on the CPU", (), "N", _number(0)),
    Flag("n_cpu_ffn", ("-ncffn", "--n-cpu-ffn"), "dense FFN of the first N layers on the CPU", (), "N", _number(0)),
    Flag("swa_full", ("--swa-full",), "sliding-window layers cache the whole context"),
    Flag("load_mode", ("-lm", "--load-mode"), "how weights are read", (), "|".join(LOAD_MODES), _choice(*LOAD_MODES)),
    Flag("lazy_mode", ("-lzm", "--lazy-mode"), "huge embeddings read on demand",
         (), "|".join(LAZY_MODES), _choice(*LAZY_MODES)),
    Flag("use_host_buffer", (), "no pinned host memory for weights", ("--no-host",)),
    Flag("repack", ("--repack",), "repack CPU weights", ("--no-repack", "-nr")),
    Flag("op_offload", ("--op-offload",), "large batches of CPU weights on the GPU", ("--no-op-offload",)),
    Flag("embeddings", ("--embeddings", "--embedding"), "serve embeddings"),
    Flag("reranking", ("--reranking", "--rerank"), "serve reranking"),
    Flag("pooling", ("--pooling",), "how embeddings are pooled", (), "|".join(POOLING_TYPES), _choice(*POOLING_TYPES)),
    Flag("cache_ram_mib", ("-cram", "--cache-ram"), "host memory for cached prompts, MiB", (), "N", _number(-1)),
    Flag("ctx_checkpoints", ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints"), "context checkpoints per slot",
         (), "N", _number(0)),
    Flag("mmproj", ("-mm", "--mmproj"), "multimodal projector", (), "FILE", str),
    Flag("mmproj_offload", ("--mmproj-offload",), "projector on the GPU", ("--no-mmproj-offload",)),
    Flag("lora", ("--lora",), "LoRA adapters", (), "FILE,...", _items, _join, gathers=True),
    Flag("model_draft", ("-md", "--model-draft", "--spec-draft-model"), "draft model", (), "FILE", str),
    Flag("n_gpu_layers_draft", ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"),
         "the draft's layers on GPUs", (), "N|auto|all", _number_or(_AUTO_LAYERS, 0)),
    Flag("cache_type_k_draft", ("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k"), "the draft's K cache",
         (), _TYPES, _choice(*CACHE_TYPES)),
    Flag("cache_type_v_draft", ("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v"), "the draft's V cache",
         (), _TYPES, _choice(*CACHE_TYPES)),
    Flag("devices_draft", ("-devd", "--device-draft", "--spec-draft-device"), "the draft's devices",
         (), "A,B", _device_names, _join_devices),
    Flag("override_tensor_draft", ("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"),
         "as -ot, for the draft", (), "PATTERN=BUFFER,...", _tensor_overrides, _join_overrides, gathers=True),
    Flag("spec_type", ("--spec-type",), "kinds of speculative decoding", (), "TYPE,...", str),
    Flag("spec_draft_n_max", ("--spec-draft-n-max",), "tokens drafted at a time", (), "N", _number(0)),
    Flag("override_kv", ("--override-kv",), "metadata overrides",
         (), "KEY=TYPE:VALUE,...", _items, _join, gathers=True),
    Flag("model", ("-m", "--model"), "the GGUF file", (), "FILE", str, ours=True),
    Flag("cards", ("--gpu",), "what if: cards of the catalogue, like rtx4090:2", (), "CARD[:COUNT]",
         _items, gathers=True, ours=True),
    Flag("machine", ("--machine",), "what if: the machine that `planner devices --json` wrote to this file",
         (), "FILE", str, ours=True),
    Flag("host_memory", ("--host-memory",), "what if: available host memory", (), "SIZE", str, ours=True),
    Flag("no_gpu", ("--no-gpu",), "what if: no GPU at all", ours=True),
    Flag("no_oracle", ("--no-oracle",), "formulas only, never ask llama.cpp", ours=True),
    Flag("json", ("--json",), "print one JSON object", ours=True),
)  # fmt: skip

BY_NAME: Final[Mapping[str, Flag]] = MappingProxyType({name: flag for flag in FLAGS for name in (*flag.on, *flag.off)})


@dataclass(frozen=True, slots=True)
class Options:
    """What ``planner explain`` was asked beside the request: the file, and the machine to imagine.

    ``what_if`` are the words ``NAME=SIZE`` and ``cards`` those of ``--gpu``, as written and in order; ``machine`` is
    the file of another machine.
    """

    model: str | None = None
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


@dataclass(slots=True)
class _Reading:
    """What has been read so far."""

    values: dict[str, Any] = field(default_factory=dict)
    passthrough: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, flag: Flag, value: Any) -> None:
        if flag.dest == "override_tensor":
            value = self._in_order(value)
        if flag.gathers:
            value = (*self.values.get(flag.dest, ()), *value)
        self.values[flag.dest] = value

    def _in_order(self, patterns: Sequence[overrides.Override]) -> tuple[overrides.Override, ...]:
        """Return these patterns after those that ``-cmoe`` and its like have made so far: the first match wins."""
        get = self.values.get
        to_cpu = overrides.to_cpu(cpu_moe=get("cpu_moe"), n_cpu_moe=get("n_cpu_moe"), n_cpu_ffn=get("n_cpu_ffn"))
        there = self.values.get("override_tensor", ())
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
    if reading.values.get("model", word) != word:
        raise InvalidRequest(f"two models: {reading.values['model']} and {word}; explain one at a time")
    reading.values["model"] = word


def _read_flag(reading: _Reading, flag: Flag, name: str, rest: Iterator[str]) -> None:
    if flag.parse is None:
        reading.put(flag, name in flag.on)
        return
    value = _next(rest, name, flag.metavar)
    if flag.dest == "devices" and "=" in value:
        reading.values["what_if"] = (*reading.values.get("what_if", ()), *value.split(","))
    elif flag.dest == "model":
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
    else:
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
    request = PlanRequest(role=_role(values), passthrough=tuple(reading.passthrough), **values)
    _refuse_contradictions(request, options)
    return CommandLine(request, options, tuple(reading.notes))


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
            request.n_ctx is not None and request.n_ctx_per_slot,
            "-c and --kv-unified-per-slot: give the sum over slots or the context of one, not both",
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
