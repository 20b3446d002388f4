"""What the settings look like to a reader: a table, JSON, Markdown, the start-up log."""

from __future__ import annotations

import json
from pathlib import Path

from config.render import as_json, log_values, markdown_page, markdown_table, ollama_markdown_table, text_table
from config.settings import load
from config.table import SETTINGS

LOADED = load({"PLANNER_API_KEYS": "very-secret,other-secret", "OLLAMA_KEEP_ALIVE": "-1", "HOME": "/home/me"})


def test_the_table_names_each_setting_with_its_value_and_where_it_came_from() -> None:
    lines = text_table(LOADED.values).splitlines()
    assert len(lines) == len(SETTINGS) + 1
    keep_alive = next(line for line in lines if line.startswith("PLANNER_KEEP_ALIVE"))
    assert keep_alive.split() == ["PLANNER_KEEP_ALIVE", "-1", "OLLAMA_KEEP_ALIVE"]


def test_json_gives_numbers_as_numbers_and_is_valid_even_where_a_value_is_for_ever() -> None:
    parsed = json.loads(json.dumps(as_json(LOADED.values, LOADED.warnings), allow_nan=False))
    by_name = {row["name"]: row for row in parsed["settings"]}
    assert by_name["PLANNER_NUM_PARALLEL"]["value"] == 1
    assert by_name["PLANNER_KEEP_ALIVE"]["value"] == "-1"
    assert by_name["PLANNER_KEEP_ALIVE"]["origin"] == "OLLAMA_KEEP_ALIVE"
    assert by_name["PLANNER_LOAD_TIMEOUT"]["value"] == 300


def test_no_rendering_shows_a_key() -> None:
    shown = text_table(LOADED.values) + json.dumps(as_json(LOADED.values)) + str(log_values(LOADED.values))
    assert "secret" not in shown
    assert "(2 set)" in shown


def test_the_start_up_log_marks_what_was_not_left_to_the_default() -> None:
    values = log_values(LOADED.values)
    assert values["keep_alive"] == "-1 (OLLAMA_KEEP_ALIVE)"
    assert values["num_parallel"] == "1"


def test_the_documentation_has_a_row_for_every_setting() -> None:
    assert all(f"`{setting.variable}`" in markdown_table() for setting in SETTINGS)
    widths = {line.replace("\\|", "").count("|") for line in markdown_table().splitlines()}
    assert widths == {5}


def test_the_map_to_ollama_names_the_variable_that_is_taken() -> None:
    store = next(line for line in ollama_markdown_table().splitlines() if "PLANNER_STORE" in line)
    assert "`OLLAMA_MODELS`" in store


def test_the_page_of_settings_is_the_tables() -> None:
    page = Path(__file__).parents[2] / "docs/settings.md"
    assert page.read_text() == markdown_page(), "print it again: python -m config.render > docs/settings.md"
