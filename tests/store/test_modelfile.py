"""Modelfiles, by Ollama's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.api.store import BadCreate
from supervisor.store import modelfile


def test_every_command_is_read_whatever_its_case() -> None:
    read = modelfile.parse(
        "# a comment\n"
        "FROM llama3.2:1b\n"
        "\n"
        "adapter ./lora.gguf\n"
        "  # another\n"
        "Template {{ .Prompt }}\n"
        'SYSTEM "You are terse."\n'
        "PARAMETER num_ctx 4096\n"
        "PARAMETER temperature 0.5\n"
        'PARAMETER stop "<|end|> "\n'
        "PARAMETER stop User:\n"
        "PARAMETER use_mmap false\n"
        "MESSAGE user hello there\n"
        'MESSAGE assistant """hi,\nfriend"""\n'
        'LICENSE """\nline one\nline "two"\n"""\n'
        "LICENSE MIT\n"
    )
    assert read.sources == ("llama3.2:1b",)
    assert read.adapters == ("./lora.gguf",)
    assert read.template == "{{ .Prompt }}"
    assert read.system == "You are terse."
    assert read.parameters == {"num_ctx": 4096, "temperature": 0.5, "stop": ["<|end|> ", "User:"], "use_mmap": False}
    assert read.messages == (
        {"role": "user", "content": "hello there"},
        {"role": "assistant", "content": "hi,\nfriend"},
    )
    assert read.licenses == ('\nline one\nline "two"\n', "MIT")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way_and_a_mark_of_utf8_may_begin_them(end: str) -> None:
    read = modelfile.parse(f"\ufeffFROM a{end}SYSTEM be{end}PARAMETER seed -1")
    assert (read.sources, read.system, read.parameters) == (("a",), "be", {"seed": -1})


def test_a_comment_within_quotes_is_text() -> None:
    assert modelfile.parse('FROM a\nSYSTEM """\n# not a comment\n"""').system == "\n# not a comment\n"


def test_what_ollama_has_forgotten_is_left_out() -> None:
    assert modelfile.parse("FROM a\nPARAMETER mirostat 2\nPARAMETER low_vram true").parameters == {}


@pytest.mark.parametrize(
    "text,problem",
    [
        ("", "no FROM line"),
        ("SYSTEM a", "no FROM line"),
        ("FROM a\nFORM b", r"\(line 2\): command must be one of \"from\", \"license\""),
        ("FROM a\n\nPARAMETER num_ctx many", r"\(line 3\): invalid int value 'many' for parameter num_ctx"),
        ("FROM a\nPARAMETER temperature hot", r"\(line 2\): invalid float value 'hot'"),
        ("FROM a\nPARAMETER use_mmap perhaps", r"\(line 2\): invalid bool value 'perhaps'"),
        ("FROM a\nPARAMETER not_one 1", r"\(line 2\): unknown parameter 'not_one'"),
        ("FROM a\nMESSAGE tool hello", r"\(line 2\): message role must be one of"),
        ('FROM a\nSYSTEM """never\nclosed', r"\(line 2\): the quotes that begin here are never closed"),
        ("FROM", r"\(line 1\): FROM says nothing"),
        ("FROM a\nPARAMETER num_ctx", r"\(line 2\): PARAMETER says nothing"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(BadCreate, match=problem):
        modelfile.parse(text)


@given(st.text(alphabet=st.sampled_from('FROMSYT a"\n\r#\t\\x'), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert modelfile.parse(text).sources
    except BadCreate as error:
        assert "\n" not in str(error)  # noqa: PT017 - there is nothing else to hold of it
