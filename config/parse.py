"""Pure parsers from a setting's text to its value and back, one ``Kind`` for each sort of setting.

``Kind.parse`` raises ``ValueError`` whenever the text is not what ``Kind.allowed`` says; the caller, who knows the
variable's name, makes the one error line out of ``allowed``. ``Kind.show`` gives a text that parses back to the value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from config.values import Address, DeviceBytes, RpcServer

KIB: Final = 1024
MIB: Final = KIB**2
GIB: Final = KIB**3

# Binary throughout: a user who writes 8G of GPU memory means what nvidia-smi calls 8 GiB.
_SIZE_UNITS: Final = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
# Twenty digits hold any size there is and keep the arithmetic finite; likewise below.
_SIZE: Final = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)

# Go's time.ParseDuration, which Ollama's settings follow, and the days and weeks that people write all the same: Ollama
# reads such a text as its default of minutes, without a word.
_DURATION_UNITS: Final = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0,
}  # fmt: skip
_DURATION_PART: Final = re.compile(r"(\d{1,12}\.?\d{0,12}|\.\d{1,12})(ns|us|µs|ms|s|m|h|d|w)")
_SECONDS: Final = re.compile(r"\d{1,12}(?:\.\d{1,12})?")

# Go's strconv.ParseBool.
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})

DEFAULT_PORT: Final = 11434
MAX_PORT: Final = 65535
MAX_RPC_SERVERS: Final = 16  # GGML_RPC_MAX_SERVERS, ggml/include/ggml-rpc.h

# llama.cpp's spelling of its device names; what the user writes is matched without regard to case, as -dev does.
DEVICE_PREFIXES: Final = ("CUDA", "ROCm", "Vulkan", "SYCL", "MTL", "MUSA", "RPC")
_DEVICE_PREFIXES: Final = {prefix.lower(): prefix for prefix in DEVICE_PREFIXES}
_DEVICE_NAME: Final = re.compile(r"([A-Za-z]+)(\d{1,3})")


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """How one sort of setting is read, shown and described. ``allowed`` completes "'x' is not ..."."""

    allowed: str
    parse: Callable[[str], T]
    show: Callable[[T], str]


def clean(text: str) -> str:
    """Return the text without outer white space and one layer of quotes, as Ollama reads its variables."""
    text = text.strip()
    for quote in ('"', "'"):
        if len(text) > 1 and text[0] == text[-1] == quote:
            return text[1:-1]
    return text


def parse_size(text: str) -> int:
    """Return the bytes of ``8GiB``, ``8G``, ``8 GB`` (all binary), ``1.5G`` or plain bytes, rounded down.

    Flags are read alike (``planner.units.parse_size``). Raises ValueError.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    multiple = _SIZE_UNITS[(match.group(2) or "").upper()]
    whole, _, fraction = match.group(1).partition(".")
    if fraction and not match.group(2):
        raise ValueError(text)
    return int(whole) * multiple + int(fraction or "0") * multiple // int("1" + "0" * len(fraction))


def format_size(size_bytes: int) -> str:
    """Return the size in its largest exact unit: ``2GiB``, ``1536MiB``, ``1000``."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def parse_duration(text: str) -> float:
    """Return the seconds of ``5m``, ``1h2m3s``, ``2d``, ``300``; negative is for ever (inf). Raises ValueError."""
    digits = text.removeprefix("-")
    if _SECONDS.fullmatch(digits):
        seconds = float(digits)
    else:
        parts = _DURATION_PART.findall(digits)
        if not parts or "".join(number + unit for number, unit in parts) != digits:
            raise ValueError(text)
        seconds = sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)
    return math.inf if text.startswith("-") and seconds > 0 else seconds


def format_duration(seconds: float) -> str:
    """Return ``5m``, ``1h2m3s``, ``250ms``; ``-1`` for ever."""
    if math.isinf(seconds):
        return "-1"
    if seconds != int(seconds):
        return f"{seconds!r}s" if "e" not in repr(seconds) else f"{seconds:.9f}s"
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if n]
    return "".join(parts) or "0s"


def whole_number(lowest: int, highest: int) -> Kind[int]:
    """Accept decimal digits within a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text, re.ASCII) or not lowest <= int(text) <= highest:
            raise ValueError(text)
        return int(text)

    return Kind(f"a whole number from {lowest} to {highest}", parse, str)


def whole_number_or(words: Mapping[str, T], lowest: int, highest: int, meaning: str) -> Kind[int | T]:
    """Accept decimal digits within a range, or words that stand for these values, in any case; the first is shown."""
    number = whole_number(lowest, highest)

    def parse(text: str) -> int | T:
        return words[text.lower()] if text.lower() in words else number.parse(text)

    allowed = f"{number.allowed}, or {' or '.join(words)} ({meaning})"
    return Kind(allowed, parse, lambda value: next((word for word, each in words.items() if each == value), str(value)))


def optional(kind: Kind[T], *, none: str, meaning: str) -> Kind[T | None]:
    """Accept what ``kind`` does, and a text that stands for None."""

    def parse(text: str) -> T | None:
        return None if text == none else kind.parse(text)

    return Kind(
        f"{kind.allowed}, or {none} ({meaning})", parse, lambda value: none if value is None else kind.show(value)
    )


def size(lowest: int, highest: int) -> Kind[int]:
    """Accept a size within a range of bytes."""

    def parse(text: str) -> int:
        value = parse_size(text)
        if not lowest <= value <= highest:
            raise ValueError(text)
        return value

    allowed = f"a size such as 8GiB, 8G or bytes, from {format_size(lowest)} to {format_size(highest)}"
    return Kind(allowed, parse, format_size)


def size_in_mib(highest_mib: int) -> Kind[int]:
    """Accept a size in whole MiB. A bare number other than 0 would be bytes, hence too small: the unit is asked for."""

    def parse(text: str) -> int:
        value = parse_size(text)
        if value % MIB or value // MIB > highest_mib:
            raise ValueError(text)
        return value // MIB

    allowed = f"a size in whole MiB such as 512MiB or 2GiB, from 0 to {format_size(highest_mib * MIB)}"
    return Kind(allowed, parse, lambda value: format_size(value * MIB))


def duration(*, lowest_s: float = 0.0, forever: str | None = None, zero_is_forever: bool = False) -> Kind[float]:
    """Accept a duration. A negative one is for ever where ``forever`` says what that means, else it is refused."""

    def parse(text: str) -> float:
        value = parse_duration(text)
        if zero_is_forever and value == 0:
            return math.inf
        if value < lowest_s or (math.isinf(value) and forever is None):
            raise ValueError(text)
        return value

    least = f" of at least {format_duration(lowest_s)}" if lowest_s else ""
    allowed = f"a duration{least} such as 5m, 1h2m3s, 2d or 300 (seconds)"
    if forever is not None:
        allowed += f", or -1 ({forever})"
    return Kind(allowed, parse, format_duration)


def boolean(*, any_text_is_true: bool = False) -> Kind[bool]:
    """Accept what Go's ParseBool does; Ollama takes any other text as true."""

    def parse(text: str) -> bool:
        if text in _FALSE:
            return False
        if text in _TRUE or any_text_is_true:
            return True
        raise ValueError(text)

    return Kind("true or false (also 1, 0, t, f)", parse, lambda value: "true" if value else "false")


def choice(*values: str, also: Mapping[str, str] = MappingProxyType({})) -> Kind[str]:
    """Accept one of some words, or another spelling of one of them, without regard to case."""

    def parse(text: str) -> str:
        word = text.lower()
        word = also.get(word, word)
        if word not in values:
            raise ValueError(text)
        return word

    return Kind(f"one of {', '.join(values)}", parse, str)


def log_level() -> Kind[int]:
    """Accept Ollama's DEBUG: false or 0 (info), true or 1 (debug), 2 (trace). The value is 0, 1 or 2."""

    def parse(text: str) -> int:
        if text == "2":
            return 2
        return int(boolean().parse(text))

    return Kind("false or 0 (info), true or 1 (debug), 2 (trace)", parse, str)


def path() -> Kind[Path]:
    """Accept a path; ``~`` is the home folder, and what is relative hangs on the working folder."""

    def parse(text: str) -> Path:
        if "\0" in text:
            raise ValueError(text)
        return Path(os.path.abspath(os.path.expanduser(text)))  # noqa: PTH100, PTH111 - a link stays as it was written

    return Kind("a path", parse, str)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def text_list(allowed: str, item: str) -> Kind[tuple[str, ...]]:
    """Accept a comma list whose items match a regular expression; empty items are refused."""
    pattern = re.compile(item)

    def parse(text: str) -> tuple[str, ...]:
        items = _items(text)
        if not all(pattern.fullmatch(part) for part in items):
            raise ValueError(text)
        return tuple(dict.fromkeys(items))

    return Kind(allowed, parse, ",".join)


def device_name(text: str) -> str:
    """Return llama.cpp's spelling of a device name (``cuda0`` -> ``CUDA0``). Raises ValueError."""
    match = _DEVICE_NAME.fullmatch(text)
    if match is None or match.group(1).lower() not in _DEVICE_PREFIXES:
        raise ValueError(text)
    return _DEVICE_PREFIXES[match.group(1).lower()] + match.group(2)


def device_bytes(*, default: int | None, zero_is_default: bool = False) -> Kind[DeviceBytes]:
    """Accept one size for every device, ``NAME=SIZE`` for some, or both. ``zero_is_default``: a lone 0 is no figure."""

    def parse(text: str) -> DeviceBytes:
        for_all, by_name = default, {}
        seen_for_all = False
        for item in _items(text):
            name, given, size_text = item.rpartition("=")
            if given:
                name = device_name(name.strip())
                if name in by_name:
                    raise ValueError(text)
                by_name[name] = parse_size(size_text.strip())
            elif seen_for_all:
                raise ValueError(text)
            else:
                for_all, seen_for_all = parse_size(item), True
        if zero_is_default and for_all == 0:
            for_all = default
        return DeviceBytes(for_all, MappingProxyType(by_name))

    allowed = "a size for every device (2GiB), or sizes by device name (CUDA0=2GiB,CUDA1=0), or both (1GiB,CUDA0=2GiB)"
    return Kind(allowed, parse, _show_device_bytes)


def _show_device_bytes(value: DeviceBytes) -> str:
    parts = [] if value.default is None else [format_size(value.default)]
    return ",".join(parts + [f"{name}={format_size(size)}" for name, size in value.by_name.items()])


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > MAX_PORT:
        raise ValueError(text)
    return int(text)


_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\]")


def address() -> Kind[Address]:
    """Accept ``host``, ``host:port``, ``:port`` or ``http://host:port``, as OLLAMA_HOST does; there is no TLS here."""

    def parse(text: str) -> Address:
        default_port = DEFAULT_PORT
        if text.startswith("http://"):
            text, default_port = text.removeprefix("http://").rstrip("/"), 80
        if text.count(":") > 1 and not text.startswith("["):
            text = f"[{text}]"  # an IPv6 address without brackets has no port
        host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if not colon:
            host = text
        if host and not _HOST.fullmatch(host):
            raise ValueError(text)
        return Address(host.strip("[]") or "0.0.0.0", _port(port) if colon else default_port)  # noqa: S104 - what was asked for

    return Kind("an address such as 127.0.0.1:11434, 0.0.0.0 or [::1]:8080 (plain HTTP)", parse, str)


def registry() -> Kind[str]:
    """Accept ``host``, ``host:port``, or either behind ``https://`` or ``http://``."""

    def parse(text: str) -> str:
        scheme, host = text[: text.find("://") + 3] if "://" in text else "", text.rpartition("://")[2].rstrip("/")
        name, colon, port = host.partition(":")
        if scheme not in {"", "https://", "http://"} or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", name):
            raise ValueError(text)
        return scheme + name + (f":{_port(port)}" if colon else "")

    return Kind("a registry's host such as registry.example.org or http://127.0.0.1:5000", parse, str)


def rpc_servers() -> Kind[tuple[RpcServer, ...]]:
    """Accept a comma list of ``host:port`` or ``host:port=SIZE``; hosts are names or IPv4, as llama.cpp's are."""

    def one(text: str) -> RpcServer:
        endpoint, given, cap = text.partition("=")
        host, _, port = endpoint.strip().rpartition(":")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
            raise ValueError(text)
        return RpcServer(host, _port(port), parse_size(cap.strip()) if given else None)

    def parse(text: str) -> tuple[RpcServer, ...]:
        servers = tuple(one(item) for item in _items(text))
        if len({server.endpoint for server in servers}) < len(servers) or len(servers) > MAX_RPC_SERVERS:
            raise ValueError(text)
        return servers

    def show(servers: tuple[RpcServer, ...]) -> str:
        return ",".join(
            server.endpoint + ("" if server.cap_bytes is None else f"={format_size(server.cap_bytes)}")
            for server in servers
        )

    allowed = f"up to {MAX_RPC_SERVERS} different workers such as 10.0.0.2:50052 or 10.0.0.2:50052=24GiB, by commas"
    return Kind(allowed, parse, show)
