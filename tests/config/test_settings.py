"""The settings: what each text means, where a value comes from, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import light
from config.parse import format_duration, format_size, parse_duration, parse_size
from config.resolve import ConfigError, Problem, resolve
from config.settings import Settings, load
from config.table import SETTINGS, Setting
from config.values import Address, DeviceBytes, RpcServer

GIB = 1024**3
T = TypeVar("T")


def test_without_any_variable_every_setting_has_the_documented_default() -> None:
    settings = load({"HOME": "/home/me"}).settings
    assert settings.num_parallel == 1
    assert settings.max_loaded_models == 0
    assert settings.max_queue == 512
    assert settings.gpu_overhead == DeviceBytes(0)
    assert settings.max_vram == DeviceBytes(None)
    assert settings.keep_alive == 300
    assert settings.load_timeout == 300
    assert settings.context_length is None
    assert settings.kv_cache_type == "f16"
    assert settings.host == Address("127.0.0.1", 11434)
    assert settings.models == Path("/home/me/.local/share/loadmaster/models")
    assert settings.state_dir == Path("/home/me/.local/state/loadmaster")


def test_every_row_of_the_table_is_a_field_and_every_field_a_row() -> None:
    assert list(Settings.model_fields) == [setting.field for setting in SETTINGS]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_default_is_a_value_that_its_own_setting_accepts(setting: Setting) -> None:
    default = setting.default_for({"HOME": "/home/me"})
    text = setting.kind.show(default)
    assert text == "" or setting.kind.parse(text) == default


def test_ours_wins_over_ollamas_which_wins_over_the_default() -> None:
    loaded = load({"PLANNER_NUM_PARALLEL": "2", "OLLAMA_NUM_PARALLEL": "3", "OLLAMA_MAX_QUEUE": "7"})
    assert (loaded.settings.num_parallel, loaded.settings.max_queue) == (2, 7)
    origins = {value.setting.name: value.origin for value in loaded.values}
    assert origins["NUM_PARALLEL"] == "PLANNER_NUM_PARALLEL"
    assert origins["MAX_QUEUE"] == "OLLAMA_MAX_QUEUE"
    assert origins["KEEP_ALIVE"] == "default"


def test_an_empty_variable_counts_as_unset_and_quotes_are_taken_off() -> None:
    loaded = load({"PLANNER_NUM_PARALLEL": "  ", "OLLAMA_NUM_PARALLEL": " '4' "})
    assert loaded.settings.num_parallel == 4


def test_all_bad_values_are_listed_each_with_name_what_was_given_and_what_is_allowed() -> None:
    environ = {"PLANNER_NUM_PARALLEL": "abc", "PLANNER_KEEP_ALIVE": "1 day", "PLANNER_MAX_QUEUE": "5"}
    with pytest.raises(ConfigError) as caught:
        load(environ)
    assert [problem.name for problem in caught.value.problems] == ["PLANNER_NUM_PARALLEL", "PLANNER_KEEP_ALIVE"]
    assert str(caught.value).splitlines()[0] == (
        "PLANNER_NUM_PARALLEL: 'abc' is not a whole number from 1 to 256, or auto or 0 ("
        "up to 4, as many as cost nothing)"
    )


@pytest.mark.parametrize("text", ["-1", "0x10", "0o10", "1_0", "1.0", "string"])
def test_a_bad_value_of_ollamas_is_one_warning_and_the_default_is_taken(text: str) -> None:
    loaded = load({"OLLAMA_NUM_PARALLEL": text})
    assert loaded.settings.num_parallel == 1
    assert loaded.warnings == (
        f"OLLAMA_NUM_PARALLEL: {text!r} is not a whole number from 1 to 256, or 0 (one); using 1",
    )


@pytest.mark.parametrize(
    "environ, slots",
    [
        ({"PLANNER_NUM_PARALLEL": "auto"}, "auto"),
        ({"PLANNER_NUM_PARALLEL": "0"}, "auto"),
        ({"OLLAMA_NUM_PARALLEL": "0"}, 1),
        ({"OLLAMA_NUM_PARALLEL": "auto"}, 1),
        ({"PLANNER_NUM_PARALLEL": "auto", "OLLAMA_NUM_PARALLEL": "3"}, "auto"),
    ],
)
def test_slots_are_left_to_the_planner_by_our_own_setting_alone(environ: dict[str, str], slots: int | str) -> None:
    """Ollama's 0 has been one since it ceased to choose; it knows no auto."""
    loaded = load(environ)
    assert loaded.settings.num_parallel == slots
    assert len(loaded.warnings) == (environ.get("OLLAMA_NUM_PARALLEL") == "auto" and len(environ) == 1)
    (shown,) = (value.shown for value in loaded.values if value.setting.name == "NUM_PARALLEL")
    assert shown == str(slots)


@pytest.mark.parametrize("text,level", [("", 0), ("0", 0), ("false", 0), ("1", 1), ("true", 1), ("2", 2)])
def test_how_much_is_logged_reads_as_it_does_for_ollama(text: str, level: int) -> None:
    assert load({"OLLAMA_DEBUG": text}).settings.debug == level


def test_origins_are_a_list_of_patterns() -> None:
    origins = ("http://10.0.0.1:*", "https://*.example.org", "app://mine")
    assert load({"OLLAMA_ORIGINS": " , ".join(origins)}).settings.origins == origins
    with pytest.raises(ConfigError, match="PLANNER_ORIGINS"):
        load({"PLANNER_ORIGINS": "example.org"})


def test_an_unknown_name_of_ours_is_warned_about_with_the_nearest_one() -> None:
    loaded = load({"PLANNER_KEEP_ALIFE": "1m"})
    assert loaded.warnings == ("PLANNER_KEEP_ALIFE is not a setting; did you mean PLANNER_KEEP_ALIVE?",)


def test_ollamas_folder_of_models_is_taken_for_the_store_not_for_the_folder_of_gguf_files() -> None:
    loaded = load({"OLLAMA_MODELS": "/usr/share/ollama/.ollama/models", "HOME": "/h"})
    assert loaded.settings.models == Path("/h/.local/share/loadmaster/models")
    assert loaded.settings.store == Path("/usr/share/ollama/.ollama/models")
    assert loaded.warnings == ()


def test_the_store_is_ollamas_own_where_this_user_has_one_else_a_folder_of_ours(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert load(environ).settings.store == tmp_path / ".local/share/loadmaster/store"
    (tmp_path / ".ollama/models").mkdir(parents=True)
    assert load(environ).settings.store == tmp_path / ".ollama/models"
    assert load(environ | {"PLANNER_STORE": "/s"}).settings.store == Path("/s")


@pytest.mark.parametrize("text", ["registry.example.org", "127.0.0.1:5000", "http://127.0.0.1:5000", "https://r/"])
def test_a_registry_is_a_host_with_or_without_a_scheme(text: str) -> None:
    assert load({"PLANNER_REGISTRY": text}).settings.registry == text.rstrip("/")


@pytest.mark.parametrize("text", ["ftp://r", "r/path", "r:0x1", "r:70000", "../r", "http://", "user@r"])
def test_a_registry_is_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError, match="PLANNER_REGISTRY"):
        load({"PLANNER_REGISTRY": text})


@pytest.mark.parametrize("host", ["0.0.0.0", ":11434", "[::]:80", "192.168.1.4:11434", "my-box"])  # noqa: S104 - refused
def test_listening_beyond_this_machine_needs_a_key_or_explicit_permission(host: str) -> None:
    with pytest.raises(ConfigError, match="PLANNER_API_KEYS"):
        load({"PLANNER_HOST": host})
    assert load({"PLANNER_HOST": host, "PLANNER_API_KEYS": "abc"}).settings.api_keys == ("abc",)
    assert load({"PLANNER_HOST": host, "PLANNER_ALLOW_REMOTE": "true"}).settings.allow_remote


def test_a_client_may_name_a_service_elsewhere_without_a_key() -> None:
    assert resolve({"PLANNER_HOST": "gpu-box"}, fields={"host"}).problems == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "[::1]:80", "::1", "http://127.0.0.9:11434/"])
def test_listening_on_loopback_needs_neither(host: str) -> None:
    assert load({"PLANNER_HOST": host}).settings.host.is_loopback


@pytest.mark.parametrize(
    "text,expected",
    [
        ("127.0.0.1", Address("127.0.0.1", 11434)),
        ("[::1]:8080", Address("::1", 8080)),
        ("::1", Address("::1", 11434)),
        ("[::]", Address("::", 11434)),
        (":9000", Address("0.0.0.0", 9000)),  # noqa: S104 - only read
        ("10.0.0.4:1234", Address("10.0.0.4", 1234)),
        ("box.example.org:0", Address("box.example.org", 0)),
        (' "10.0.0.4" ', Address("10.0.0.4", 11434)),
        ("http://localhost", Address("localhost", 80)),
        ("http://[::1]:4321/", Address("::1", 4321)),
    ],
)
def test_an_address_reads_as_it_does_for_ollama(text: str, expected: object) -> None:
    assert load({"PLANNER_HOST": text, "PLANNER_ALLOW_REMOTE": "1"}).settings.host == expected


@pytest.mark.parametrize(
    "text", ["https://127.0.0.1", "127.0.0.1:99999", "127.0.0.1:-1", "a b", "127.0.0.1:x", "http://h/path"]
)
def test_an_address_that_cannot_be_listened_on_is_refused(text: str) -> None:
    """One of Ollama's is not half believed: its host with another port could be open to more than was meant."""
    with pytest.raises(ConfigError, match="PLANNER_HOST"):
        load({"PLANNER_HOST": text, "PLANNER_ALLOW_REMOTE": "1"})
    assert load({"OLLAMA_HOST": text}).settings.host == Address("127.0.0.1", 11434)


@pytest.mark.parametrize(
    "text,expected", [("8GiB", 8 * GIB), ("8G", 8 * GIB), ("8gb", 8 * GIB), ("1.5k", 1536), ("42", 42), ("0", 0)]
)
def test_sizes_are_binary(text: str, expected: object) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text,seconds",
    [
        ("5m", 300),
        ("5m0s", 300),
        ("1h2m3s", 3723),
        ("300", 300),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("1d", 86_400),
        ("1w2d", 9 * 86_400),
        ("0", 0),
        ("-0", 0),
        ("-1", math.inf),
        ("-1m", math.inf),
    ],
)
def test_durations_read_as_go_writes_them_and_in_days_and_weeks(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["1y", "???", "", "5 m", "m", "--1", "1h-2m", "nan", "1e3", "9" * 400])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is the input; the caller words the message
        parse_duration(text)


@pytest.mark.parametrize("text,keep_alive", [("0", 0), ("-0", 0), ("-1", math.inf), ("-1m", math.inf)])
def test_zero_unloads_at_once_and_below_that_never_and_either_waits_for_ever_for_a_load(
    text: str, keep_alive: float
) -> None:
    settings = load({"OLLAMA_KEEP_ALIVE": text, "OLLAMA_LOAD_TIMEOUT": text}).settings
    assert settings.keep_alive == keep_alive
    assert settings.load_timeout == math.inf


@pytest.mark.parametrize(
    "text,expected",
    [
        ("2GiB", DeviceBytes(2 * GIB)),
        ("CUDA0=2GiB,CUDA1=0", DeviceBytes(0, {"CUDA0": 2 * GIB, "CUDA1": 0})),
        ("1GiB,cuda0=2GiB", DeviceBytes(GIB, {"CUDA0": 2 * GIB})),
    ],
)
def test_an_overhead_is_for_every_device_or_by_name(text: str, expected: object) -> None:
    assert load({"PLANNER_GPU_OVERHEAD": text}).settings.gpu_overhead == expected


@pytest.mark.parametrize("text", ["GPU0=1G", "1G,2G", "CUDA0=1G,CUDA0=2G", "CUDA0=", "=1G", "CUDA0=1G,"])
def test_an_overhead_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="PLANNER_GPU_OVERHEAD"):
        load({"PLANNER_GPU_OVERHEAD": text})


def test_no_limit_in_ollama_is_no_limit_here_but_ours_of_zero_is_one() -> None:
    assert load({"OLLAMA_MAX_VRAM": "0"}).settings.max_vram == DeviceBytes(None)
    assert load({"PLANNER_MAX_VRAM": "0"}).settings.max_vram == DeviceBytes(0)


def test_any_text_is_true_in_ollama_but_not_here() -> None:
    assert load({"OLLAMA_SCHED_SPREAD": "yes"}).settings.sched_spread
    with pytest.raises(ConfigError, match="true or false"):
        load({"PLANNER_SCHED_SPREAD": "yes"})


def test_rpc_workers_may_be_capped() -> None:
    servers = load({"PLANNER_RPC_SERVERS": "10.0.0.2:50052=24GiB, box:1"}).settings.rpc_servers
    assert servers == (RpcServer("10.0.0.2", 50052, 24 * GIB), RpcServer("box", 1))
    assert servers[0].endpoint == "10.0.0.2:50052"


@pytest.mark.parametrize("text", ["box", "box:x", "a:1,a:1", "[::1]:1", ",", ",".join(f"h:{n}" for n in range(17))])
def test_rpc_workers_that_llama_cpp_would_not_take_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="PLANNER_RPC_SERVERS"):
        load({"PLANNER_RPC_SERVERS": text})


def test_the_prompt_cache_asks_for_a_unit_where_a_bare_number_would_be_bytes() -> None:
    assert load({"PLANNER_CACHE_RAM": "512MiB"}).settings.cache_ram == 512
    with pytest.raises(ConfigError, match="512MiB"):
        load({"PLANNER_CACHE_RAM": "512"})


def test_systemds_state_folder_is_used_where_it_made_one() -> None:
    assert load({"STATE_DIRECTORY": "/var/lib/loadmaster"}).settings.state_dir == Path("/var/lib/loadmaster")


def test_settings_cannot_be_changed_and_do_not_print_their_keys() -> None:
    settings = load({"PLANNER_API_KEYS": "very-secret"}).settings
    assert "very-secret" not in repr(settings)
    assert "very-secret" not in str(settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.num_parallel = 2


def test_a_bad_key_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"PLANNER_API_KEYS": "with space"})
    assert "with space" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "lots", "-1", "8Q", "1.5", "1 2", "9" * 400 + ".5G", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is the input; the caller words the message
        parse_size(text)


@given(st.integers(0, 2**60))
def test_a_size_reads_back_what_it_shows(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.floats(0, 1e9).map(lambda seconds: round(seconds, 3)))
def test_a_duration_reads_back_what_it_shows(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


TEXTS = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "8GiB", "CUDA0=1G", "true", "yes", "off", "q8_0", "h:1", "h:1=2G", "5m"]),
    st.integers().map(str),
    st.text(max_size=12),
)
VARIABLES = st.sampled_from([s.variable for s in SETTINGS] + [s.ollama_variable for s in SETTINGS])


@given(st.dictionaries(VARIABLES, TEXTS, max_size=12))
def test_the_light_door_reads_the_same_values_and_finds_the_same_faults(environ: dict[str, str]) -> None:
    environ = {"PLANNER_ALLOW_REMOTE": "true", "HOME": "/h"} | environ
    light_names = {setting.variable for setting in SETTINGS if setting.light}
    placement, light_problems = _read(lambda: light.read(environ).settings)
    full, problems = _read(lambda: load(environ).settings)
    assert light_problems == tuple(problem for problem in problems if problem.name in light_names)
    if placement is not None and full is not None:
        assert full.placement == placement


def _read(door: Callable[[], T]) -> tuple[T | None, tuple[Problem, ...]]:
    try:
        return door(), ()
    except ConfigError as error:
        return None, error.problems


def test_the_light_door_loads_no_pydantic() -> None:
    code = "import sys, config.light; config.light.read(); sys.exit('pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
