"""The models file: what its keys mean, what holds where it says nothing, and what is refused."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.model_settings import ModelSettings, ModelsFile
from config.models_file import json_schema, markdown_page, parse, read
from config.models_table import EXTERNAL_KEYS, MODEL_KEYS
from config.resolve import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def problems(text: str) -> list[str]:
    """Return the lines that this text is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "models.toml")
    return str(caught.value).splitlines()


def test_a_model_has_what_it_says_and_the_defaults_where_it_says_nothing() -> None:
    file = parse('[defaults]\nkeep_alive = "10m"\nslots = 2\n[models.one]\nslots = 4\ncontext = 8192\n', "models.toml")
    assert (file.of("one").slots, file.of("one").context, file.of("one").keep_alive) == (4, 8192, 600.0)
    assert (file.of("other").slots, file.of("other").context) == (2, None)


def test_what_requests_get_is_merged_field_by_field() -> None:
    text = "[defaults]\nset = { temperature = 0.5, top_k = 20 }\n[models.one]\nset = { temperature = 0.1 }\n"
    assert dict(parse(text, "models.toml").of("one").set) == {"temperature": 0.1, "top_k": 20}


def test_the_example_is_a_models_file() -> None:
    file = read(ROOT / "deploy" / "models.toml")
    assert file.of("qwen3-8b").keep_alive == 600.0
    assert file.of("qwen3-8b").devices == ("CUDA0",)
    assert dict(file.external["comfy"].memory) == {"CUDA1": 9 * GIB, "Host": 4 * GIB}


def test_durations_may_be_numbers_and_a_negative_one_is_for_ever() -> None:
    file = parse("[models.one]\nkeep_alive = -1\n[models.two]\nkeep_alive = 90\n", "models.toml")
    assert (file.of("one").keep_alive, file.of("two").keep_alive) == (math.inf, 90.0)


def test_a_file_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "models.toml") == ModelsFile()


@pytest.mark.parametrize("text", ['"auto"', "0", '"0"'])
def test_slots_may_be_left_to_the_planner(text: str) -> None:
    file = parse(f"[defaults]\nslots = 2\n[models.one]\nslots = {text}\n", "models.toml")
    assert (file.of("one").slots, file.of("other").slots) == ("auto", 2)


def test_everything_that_is_wrong_is_listed_with_its_place_and_what_is_allowed() -> None:
    lines = problems('[models.one]\ncontext = "long"\nmtp = 1\nsolts = 2\n[external.comfy]\ncmd = ["a"]\n[model.x]\n')
    assert lines[0].startswith("models.toml: [models.\"one\"] context: 'long' is not a whole number")
    assert lines[1].startswith('models.toml: [models."one"] mtp: 1 is not true or false')
    assert "solts" in lines[2]
    assert "slots" in lines[2]
    assert lines[3] == 'models.toml: [external."comfy"] url is missing: a text'
    assert [line.split("] ")[1].split(" ")[0] for line in lines[4:6]] == ["health", "memory"]
    assert lines[6].startswith("models.toml: [model]")


@pytest.mark.parametrize(
    "text",
    [
        '[models.one]\naliases = ["shared"]\n[models.two]\naliases = ["Shared"]\n',
        '[models.one]\naliases = ["two"]\n[models.two]\n',
    ],
)
def test_a_name_belongs_to_one_model_only(text: str) -> None:
    assert len(problems(text)) == 1


def test_a_request_field_that_json_cannot_carry_is_refused() -> None:
    assert len(problems("[models.one]\nset = { until = 2026-01-01, most = inf }\n")) == 1


def test_text_that_is_not_toml_is_refused_with_its_line() -> None:
    (line,) = problems("[models.one\n")
    assert "line 1" in line


@given(st.text(max_size=200))
def test_any_text_is_a_models_file_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert isinstance(parse(text, "models.toml"), ModelsFile)


@pytest.mark.parametrize("content", [b"\xff", b"#" * (2 << 20)])
def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "models.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"models\.toml"):
        read(tmp_path / "models.toml")


def test_the_schema_has_every_key() -> None:
    properties = json_schema()["properties"]
    model = properties["models"]["additionalProperties"]
    external = properties["external"]["additionalProperties"]
    assert set(model["properties"]) == {key.name for key in MODEL_KEYS}
    assert set(external["properties"]) == {key.name for key in EXTERNAL_KEYS}
    assert set(external["required"]) == {"cmd", "url", "health", "memory"}


def test_every_key_of_a_model_is_a_field_of_its_settings() -> None:
    assert {key.name for key in MODEL_KEYS} == set(ModelSettings.__slots__)


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    page = (ROOT / "docs" / "models-file.md").read_text()
    assert page == markdown_page(), "run python -m config.models_file > docs/models-file.md"
