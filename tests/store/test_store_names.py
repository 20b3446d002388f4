"""Names of models: what they may be, and that none leads out of the store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_layout import HOST

from supervisor.api.store import BadCreate, BadModelName
from supervisor.store import names
from supervisor.store.folder import StoreFolder
from supervisor.store.names import ModelName


@pytest.mark.parametrize(
    "text,full",
    [
        ("llama3.2:1b", f"{HOST}/library/llama3.2:1b"),
        ("llama3.2", f"{HOST}/library/llama3.2:latest"),
        ("someone/Model:Q4_K_M", f"{HOST}/someone/Model:Q4_K_M"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("http://127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("hub.example.org/user/Repo-GGUF:IQ2_XXS", "hub.example.org/user/Repo-GGUF:IQ2_XXS"),
    ],
)
def test_what_a_name_leaves_out_is_taken_from_the_defaults(text: str, full: str) -> None:
    assert str(names.parse(text, HOST)) == full


TRICKS = [
    "../secret",
    "..",
    ".",
    "",
    "/",
    "/etc/passwd",
    "a/../b",
    "a/b/../c",
    "../../../../etc/passwd:x",
    "a:..",
    "a:../b",
    "a:.hidden",
    ".hidden",
    "a b",
    "a\0b",
    "a\nb",
    "a%2fb",
    "a\\b",
    "ä",
    "a/b/c/d",
    "a//b",
    "//a",
    "a:",
    ":a",
    "-a",
    "ns.with.dots/a",
    "x" * 81,
    "a:" + "x" * 81,
    "https://a/b/c/d:e",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("text", TRICKS)
def test_what_is_no_name_is_refused_and_not_repeated_at_length(text: str) -> None:
    with pytest.raises(BadModelName, match="invalid model name") as caught:
        names.parse(text, HOST)
    assert len(str(caught.value)) < 500


@given(st.text(max_size=400) | st.from_regex(r"[a.:/_-]{1,30}"))
def test_no_text_ever_names_a_file_outside_of_the_manifests(text: str) -> None:
    root = Path("/store")
    try:
        path = StoreFolder(root, HOST).manifest(names.parse(text, HOST))
    except BadModelName:
        return
    assert os.path.normpath(path) == str(path)
    assert path.is_relative_to(root / "manifests")
    assert len(path.relative_to(root / "manifests").parts) == 4


@given(
    st.from_regex(
        r"\A([a-z][a-z0-9.-]{0,9}/)?([A-Za-z_][A-Za-z0-9_-]{0,9}/)?[A-Za-z0-9_][\w.-]{0,9}(:[A-Za-z0-9][\w.-]{0,9})?\Z"
    )
)
def test_the_short_form_of_a_name_names_the_same_model(text: str) -> None:
    try:
        name = names.parse(text, HOST)
    except BadModelName:
        return
    assert names.parse(name.short(HOST), HOST) == name


def test_only_the_default_host_and_namespace_are_left_out_of_the_short_form() -> None:
    assert ModelName(HOST, "library", "a", "b").short(HOST) == "a:b"
    assert ModelName(HOST, "me", "a", "b").short(HOST) == "me/a:b"
    assert ModelName("other.org", "library", "a", "b").short(HOST) == "other.org/library/a:b"
    assert ModelName(names.LOCAL_HOST, "library", "a", "b").short(HOST) == "a:b"


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:" + "g" * 64, "sha256:" + "A" * 64, "sha256:../../../../etc/passwd", "md5:" + "a" * 32],
)
def test_what_is_no_digest_names_no_blob(digest: str) -> None:
    with pytest.raises(BadCreate, match="invalid digest format"):
        StoreFolder(Path("/store")).blob(digest)
