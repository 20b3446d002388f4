"""The one table of settings. The README, ``planner config`` and the start-up log all render it.

A setting ``X`` is read from ``PLANNER_X``; where that is unset, from ``OLLAMA_X`` if the two mean the same. Nothing
here reads the environment: ``config.resolve`` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from config.parse import (
    GIB,
    KIB,
    MIB,
    Kind,
    address,
    boolean,
    choice,
    device_bytes,
    duration,
    log_level,
    optional,
    path,
    registry,
    rpc_servers,
    size,
    size_in_mib,
    text_list,
    whole_number,
    whole_number_or,
)
from config.values import Address, DeviceBytes

Environ = Mapping[str, str]

MAX_SLOTS: Final = 256  # LLAMA_MAX_SEQ, src/llama-cparams.h
MAX_QUEUE: Final = 65536  # a waiting request costs about 10 KiB: beyond this the queue is the outage
MAX_MODELS: Final = 1024  # far above what any machine holds; a larger figure is a slip of the keyboard
MAX_CONTEXT: Final = 2**27  # tokens; ten times the longest trained context there is
MAX_CACHE_RAM_MIB: Final = 1024 * 1024  # 1 TiB
# The prompt cache is host memory that every runner may fill and that a plan has to charge in full. llama-server's own
# default of 8 GiB would refuse a second model on many machines; 1 GiB keeps an idle conversation of 8k tokens of an
# 8B model (128 KiB a token).
DEFAULT_CACHE_RAM_MIB: Final = 1024
KV_CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")  # common/arg.cpp
# As many of 4, 2 and 1 as cost nothing; 0 is what Ollama called it while it chose.
SLOTS: Final = whole_number_or({"auto": "auto", "0": "auto"}, 1, MAX_SLOTS, "up to 4, as many as cost nothing")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row. ``default`` is a value, or a function of the environment whose ``default_text`` describes it.

    ``ollama`` says that ``OLLAMA_<name>`` is taken (``ollama_name`` where it has another name there), read as
    ``ollama_kind`` where Ollama reads it differently; ``ollama_note`` says what differs. ``secret`` values are never
    printed. ``light`` ones serve ``planner explain``.
    """

    name: str
    kind: Kind[Any]
    default: Any
    meaning: str
    unit: str = ""
    default_text: str = ""
    ollama: bool = False
    ollama_name: str = ""
    ollama_kind: Kind[Any] | None = None
    ollama_note: str = ""
    secret: bool = False
    light: bool = False

    @property
    def variable(self) -> str:
        """Return the name of our environment variable."""
        return f"PLANNER_{self.name}"

    @property
    def ollama_variable(self) -> str:
        """Return the name of Ollama's environment variable, taken or not."""
        return f"OLLAMA_{self.ollama_name or self.name}"

    @property
    def field(self) -> str:
        """Return the attribute's name in ``config.settings.Settings``."""
        return self.name.lower()

    @property
    def default_shown(self) -> str:
        """Return the default as the documentation shows it."""
        return self.default_text or self.kind.show(self.default) or "(empty)"

    def default_for(self, environ: Environ) -> Any:
        """Return the default's value in this environment."""
        return self.default(environ) if callable(self.default) else self.default


def _xdg(variable: str, below_home: str, rest: str) -> Callable[[Environ], Path]:
    """Return the folder that the XDG base directory specification gives for a user's files."""

    def folder(environ: Environ) -> Path:
        base = environ.get(variable, "")
        home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - the text, to be joined
        return Path(base if base.startswith("/") else f"{home}/{below_home}") / rest

    return folder


def _store(environ: Environ) -> Path:
    """Return Ollama's own store where this user has one, else a folder of ours."""
    theirs = Path(environ.get("HOME") or os.path.expanduser("~")) / ".ollama" / "models"  # noqa: PTH111 - as above
    return theirs if theirs.is_dir() else _xdg("XDG_DATA_HOME", ".local/share", "loadmaster/store")(environ)


def _docker_config(environ: Environ) -> Path:
    """Return where docker and its like keep the logins that somebody made."""
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - as above
    return Path(environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json"


def _state_dir(environ: Environ) -> Path:
    """Return systemd's state folder where it made one for us (``StateDirectory=``), else the user's."""
    given = environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else _xdg("XDG_STATE_HOME", ".local/state", "loadmaster")(environ)


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting(
        "MODELS",
        path(),
        _xdg("XDG_DATA_HOME", ".local/share", "loadmaster/models"),
        "Folder of .gguf files that are served, links in it followed; a model's id is its path below it.",
        default_text="$XDG_DATA_HOME/loadmaster/models",
    ),
    Setting(
        "MODELS_FILE",
        path(),
        _xdg("XDG_CONFIG_HOME", ".config", "loadmaster/models.toml"),
        "What is particular to single models, and programs beside them: see models-file.md; it need not be there.",
        default_text="$XDG_CONFIG_HOME/loadmaster/models.toml",
    ),
    Setting(
        "STORE",
        path(),
        _store,
        "Ollama's store of models or one like it: read in place, written by pull, create, copy and delete alone.",
        default_text="~/.ollama/models where that is, else $XDG_DATA_HOME/loadmaster/store",
        ollama=True,
        ollama_name="MODELS",
    ),
    Setting(
        "REGISTRY",
        optional(registry(), none="auto", meaning="the one that the store's models came from"),
        None,
        "Host that pull asks for a model whose name carries none; plain HTTP only where http:// says so.",
    ),
    Setting(
        "REGISTRY_LOGINS",
        path(),
        _docker_config,
        "Logins for private registries and hubs, as docker login writes them; read at each pull, it need not be there.",
        default_text="$DOCKER_CONFIG/config.json, else ~/.docker/config.json",
    ),
    Setting(
        "HOST",
        address(),
        Address("127.0.0.1", 11434),
        "Address the service listens on; one that other machines reach needs keys, or ALLOW_REMOTE.",
        ollama=True,
        ollama_note="an https:// address is refused: TLS_CERT is what makes it HTTPS",
    ),
    Setting(
        "API_KEYS",
        text_list("API keys of visible characters, by commas", r"[!-+\--~]{1,512}"),
        (),
        "Keys that clients may present as bearer tokens; empty: no key is asked for.",
        secret=True,
    ),
    Setting(
        "KEYS_FILE",
        path(),
        _xdg("XDG_CONFIG_HOME", ".config", "loadmaster/keys.toml"),
        "File of clients with keys, rights and limits of their own (`planner key` makes them); it need not be there.",
        default_text="$XDG_CONFIG_HOME/loadmaster/keys.toml",
    ),
    Setting(
        "TLS_CERT",
        optional(path(), none="off", meaning="plain HTTP"),
        None,
        "Certificate with its chain, PEM; with it the service speaks HTTPS.",
    ),
    Setting(
        "TLS_KEY",
        optional(path(), none="auto", meaning="it is in TLS_CERT's file"),
        None,
        "The certificate's private key, PEM.",
    ),
    Setting(
        "ALLOW_REMOTE",
        boolean(),
        False,
        "Listen beyond this machine even though no API key is set.",
    ),
    Setting(
        "ORIGINS",
        text_list("origins such as https://example.org or *, by commas", r"\*|[a-z][a-z0-9+.-]*://[^\s,]*"),
        (),
        "Web origins that browsers may call from, beside pages of this machine itself.",
        ollama=True,
    ),
    Setting(
        "NUM_PARALLEL",
        SLOTS,
        1,
        "Conversations that one runner serves at a time, each with its own full context.",
        unit="slots",
        ollama=True,
        ollama_kind=whole_number_or({"0": 1}, 1, MAX_SLOTS, "one"),
        ollama_note="there 0 is one, since 2025; auto is ours alone",
        light=True,
    ),
    Setting(
        "CONTEXT_LENGTH",
        optional(whole_number(1, MAX_CONTEXT), none="0", meaning="the planner decides"),
        None,
        "Tokens guaranteed to each conversation; llama-server's -c is this times the slots.",
        unit="tokens",
        ollama=True,
        light=True,
    ),
    Setting(
        "KV_CACHE_TYPE",
        choice(*KV_CACHE_TYPES),
        "f16",
        "Type of the K and V caches (llama-server's -ctk and -ctv).",
        ollama=True,
        light=True,
    ),
    Setting(
        "FLASH_ATTENTION",
        choice("auto", "on", "off", also={"1": "on", "true": "on", "t": "on", "0": "off", "false": "off", "f": "off"}),
        "auto",
        "Flash attention (llama-server's -fa).",
        ollama=True,
        ollama_note="true and false are read as on and off",
        light=True,
    ),
    Setting(
        "CACHE_RAM",
        size_in_mib(MAX_CACHE_RAM_MIB),
        DEFAULT_CACHE_RAM_MIB,
        "Host memory that each runner may fill with the prompts of idle conversations (llama-server's -cram).",
        unit="MiB",
        light=True,
    ),
    Setting(
        "GPU_OVERHEAD",
        device_bytes(default=0),
        DeviceBytes(0),
        "Memory of each GPU that is left free for other programs.",
        unit="bytes",
        ollama=True,
        ollama_note="there bytes only, for every GPU alike",
        light=True,
    ),
    Setting(
        "MAX_VRAM",
        device_bytes(default=None),
        DeviceBytes(),
        "The most that all our runners together may hold on each GPU.",
        unit="bytes",
        default_text="no limit",
        ollama=True,
        ollama_kind=device_bytes(default=None, zero_is_default=True),
        ollama_note="gone from Ollama since 2025; there 0 was no limit, and the figure was the sum of all GPUs",
        light=True,
    ),
    Setting(
        "DEVICE_OVERHEAD",
        device_bytes(default=None),
        DeviceBytes(),
        "What each runner takes on a device beside llama.cpp's buffers, where the planner's own figure is wrong.",
        unit="bytes",
        default_text="learned, else built in",
        light=True,
    ),
    Setting(
        "SCHED_SPREAD",
        boolean(),
        False,
        "Spread a model over all GPUs even where fewer would hold it.",
        ollama=True,
        ollama_kind=boolean(any_text_is_true=True),
        ollama_note="there any other text is true",
        light=True,
    ),
    Setting(
        "RPC_SERVERS",
        rpc_servers(),
        (),
        "llama.cpp RPC workers to use as devices; =SIZE caps each device (a CPU worker reports all RAM as free).",
        light=True,
    ),
    Setting(
        "LLAMA_SERVER",
        optional(path(), none="auto", meaning="the search order"),
        None,
        "The llama-server to start; when not set, the first of the search order that can use this machine's GPUs.",
        light=True,
    ),
    Setting(
        "CARDS",
        path(),
        _xdg("XDG_CONFIG_HOME", ".config", "loadmaster/cards.json"),
        "File of more cards for planner explain --gpu, in the form of gpu/catalogue.json; it need not be there.",
        default_text="$XDG_CONFIG_HOME/loadmaster/cards.json",
        light=True,
    ),
    Setting(
        "MAX_LOADED_MODELS",
        whole_number(0, MAX_MODELS),
        0,
        "The most models loaded at a time; 0: as many as memory holds.",
        unit="models",
        ollama=True,
        ollama_note="there 0 is three for each GPU",
    ),
    Setting(
        "MAX_QUEUE",
        whole_number(1, MAX_QUEUE),
        512,
        "Requests that may wait for a model; one more is answered 503.",
        unit="requests",
        ollama=True,
    ),
    Setting(
        "CLIENT_QUEUE",
        optional(whole_number(1, MAX_QUEUE), none="0", meaning="half of MAX_QUEUE"),
        None,
        "Requests of one client (its key, else its address) that may wait; one more is answered 429.",
        unit="requests",
    ),
    Setting(
        "QUEUE_TIMEOUT",
        duration(forever="wait for ever", zero_is_forever=True),
        600.0,
        "How long a request may wait for its model in all; then it is answered 503.",
        unit="seconds",
    ),
    Setting(
        "KEEP_ALIVE",
        duration(forever="never unload"),
        300.0,
        "How long an idle model stays loaded; 0 unloads it at once.",
        unit="seconds",
        ollama=True,
    ),
    Setting(
        "LOAD_TIMEOUT",
        duration(forever="wait for ever", zero_is_forever=True),
        300.0,
        "How long a loading runner may show no progress before it is given up.",
        unit="seconds",
        ollama=True,
    ),
    Setting(
        "DRAIN_TIMEOUT",
        duration(),
        30.0,
        "How long running answers may take to finish when the service stops, or a model is unloaded or reloaded.",
        unit="seconds",
    ),
    Setting(
        "STOP_GRACE",
        duration(lowest_s=0.1),
        5.0,
        "Pause between the first TERM, the second TERM and KILL when a runner is stopped.",
        unit="seconds",
    ),
    Setting(
        "MAX_BODY",
        size(KIB, 4 * GIB),
        64 * MIB,
        "The largest request body that is read; a larger one is answered 413.",
        unit="bytes",
    ),
    Setting(
        "STATE_DIR",
        path(),
        _state_dir,
        "Folder for the lock and for what runners are known by after a crash.",
        default_text="$STATE_DIRECTORY (set by systemd), else $XDG_STATE_HOME/loadmaster",
    ),
    Setting(
        "LOG_FORMAT",
        choice("auto", "json", "text"),
        "auto",
        "How the log is written; auto is text on a terminal, else JSON.",
    ),
    Setting(
        "DEBUG",
        log_level(),
        0,
        "How much is logged: 0 what matters, 1 what helps to find a fault, 2 also every line of the runners.",
        ollama=True,
    ),
)
