"""A Modelfile's templates, rendered as Ollama itself renders them, or refused whole."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.gateway.ollama.fields import Fields
from supervisor.gateway.ollama.messages import Message, read_messages
from supervisor.gateway.ollama.template import read_template
from supervisor.go_template.nodes import TemplateError
from supervisor.go_template.syntax import MAX_TEMPLATE_CHARS

GOLDEN: Any = json.loads((Path(__file__).parents[2] / "fixtures/golden/ollama_templates.json").read_text())
HELLO = (Message("user", "hello"),)


@pytest.mark.parametrize(
    "case",
    GOLDEN["rendered"],
    ids=lambda case: f"{case['template']}-{case.get('messages', 'infill')}-{case.get('think')}",
)
def test_a_template_says_what_ollama_makes_of_it(case: dict[str, Any]) -> None:
    template = read_template(GOLDEN["templates"][case["template"]])
    if "suffix" in case:
        assert template.infill(case["prompt"], case["suffix"]) == case["text"]
        return
    messages = read_messages(Fields("ChatRequest", {"messages": GOLDEN["conversations"][case["messages"]]}))
    assert template.conversation(messages, think=case.get("think")) == case["text"]


@pytest.mark.parametrize(
    "text, rendered",
    [
        ('{{ range .Messages }}{{ template "turn" . }}{{ end }}{{ define "turn" }}<{{ .Role }}>{{ end }}', "<user>"),
        ('{{ template "none" }}{{ define "none" }}[{{ . }}]{{ end }}{{ .Prompt }}{{ .Response }}', "[<no value>]hello"),
        ('{{ block "whole" .Prompt }}{{ $ }}, {{ . }}{{ end }}{{ .Response }}', "hello, hello"),
        ('{{ define "out" }}{{ block "in" . }}({{ . }}){{ end }}{{ end }}{{ template "out" 1 }}{{ .Response }}', "(1)"),
        ("{{ range $i, $_ := .Messages }}{{ template `n` $i }}{{ end }}{{ define `n` }}{{ . }}{{ end }}", "0"),
        ('{{ define "x" }}1{{ end }}{{ define "x" }} {{/* */}} {{ end }}{{ template "x" }}{{ .Response }}', "1"),
        ('{{ define "x" }} {{ end }}{{ define "x" }}2{{ end }}{{ template "x" }}{{ .Response }}', "2"),
        ('{{ template "x" $y := .Prompt }}{{ $y }}{{ define "x" }}{{ . }}{{ end }}{{ .Response }}', "hellohello"),
    ],
    ids=lambda text: text[:24],
)
def test_what_a_template_defines_is_rendered_as_gos_own_package_does(text: str, rendered: str) -> None:
    assert read_template(text).conversation(HELLO, think=None) == rendered


def test_only_a_template_that_looks_at_the_suffix_can_insert() -> None:
    assert [read_template(text).inserts for text in ("{{ .Prompt }}", "{{ .Prompt }}{{ .Suffix }}")] == [False, True]


def test_dates_and_levels_of_thought_are_known() -> None:
    text = read_template("{{ currentDate }} {{ .ThinkLevel }}{{ .Response }}").conversation(HELLO, think="high")
    assert text == f"{datetime.now(UTC).astimezone().date().isoformat()} high"


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Prompt",
        '{{ "open }}',
        "{{ if .Prompt }}",
        "{{ end }}",
        "{{ else }}",
        "{{ if .Prompt }}{{ else range .X }}{{ end }}",
        '{{ template "other" }}',
        '{{ define "x" }}',
        "{{ define x }}{{ end }}",
        '{{ define "x" .Prompt }}{{ end }}',
        '{{ define "x" }}{{ else }}{{ end }}',
        '{{ define "x" }}1{{ end }}{{ define "x" }}2{{ end }}',
        '{{ define "x" }}{{ template "x" . }}{{ end }}{{ template "x" . }}',
        '{{ if .Prompt }}{{ define "x" }}{{ end }}{{ end }}',
        '{{ $x := "out" }}{{ define "x" }}{{ $x }}{{ end }}{{ template "x" }}',
        '{{ define "x" }}{{ continue }}{{ end }}{{ range .Messages }}{{ template "x" }}{{ end }}',
        "{{ range .Messages }}{{ else }}{{ break }}{{ end }}",
        "{{ break }}",
        "{{ toTypeScriptType .Prompt }}",
        "{{ .Prompt .System }}",
        "{{ (.Prompt }}",
        "{{ .Prompt | }}",
        "{{ $unknown }}",
        "{{ .Prompt.Deeper }}",
        "{{ index .Prompt 99 }}",
        "{{ slice .Messages 3 1 }}",
        "{{ len 3 }}",
        "{{ range .Prompt }}{{ end }}",
        "{{ ( }}" * 100,
        "{{ " + "(" * 500 + ".Prompt" + ")" * 500 + " }}",
        "{{ if true }}" * 100 + "{{ end }}" * 100,
        "x" * (MAX_TEMPLATE_CHARS + 1),
    ],
    ids=lambda text: text[:24],
)
def test_a_template_that_is_wrong_or_beyond_us_is_refused(text: str) -> None:
    with pytest.raises(TemplateError):
        read_template(text).conversation(HELLO, think=None)


def test_a_template_that_goes_round_and_round_or_grows_without_end_is_refused() -> None:
    rounds = "{{ range $.Messages }}" * 8 + "{{ end }}" * 8
    grows = '{{ $x := "0123456789" }}' + '{{ $x = printf "%s%s" $x $x }}' * 60
    messages = [Message(role, "x") for role in ("user", "assistant") * 5]
    for text in (rounds, grows):
        template = read_template(text)
        with pytest.raises(TemplateError, match="too long a text, or goes round too often"):
            template.conversation(messages, think=None)


@given(st.text(alphabet='{}-.$|"`()=: \nabPromptend/*', max_size=80))
def test_no_text_makes_anything_but_a_template_or_a_refusal(text: str) -> None:
    try:
        template = read_template(text)
        template.conversation(HELLO, think=None)
    except TemplateError:
        return
    assert "{{" not in text or template.tree.nodes
