"""The keys file: who may use what, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.keys_file import Client, KeysFile, entry, hash_of, new_key, parse, read
from config.resolve import ConfigError

HASH = hash_of("lm-one")


def problems(text: str) -> list[str]:
    """Return the lines that this text is refused with."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "keys.toml")
    return str(caught.value).splitlines()


def test_a_new_key_is_let_in_by_the_lines_that_are_printed_for_it() -> None:
    key = new_key()
    client = parse(entry("laptop", key), "keys.toml").clients["laptop"]
    assert client == Client(hash_of(key))
    assert key not in entry("laptop", key)
    assert key != new_key()


def test_a_client_may_use_the_models_on_its_list_whatever_their_case() -> None:
    text = f'[clients.phone]\nhash = "{HASH}"\nmodels = ["qwen*", "Tiny"]\nconcurrency = 2\nmanage = false\n'
    phone = parse(text, "keys.toml").clients["phone"]
    assert [phone.may_use(each) for each in ("Qwen3-8b", "tiny", "tiny-2", "llama")] == [True, True, False, False]
    assert (phone.concurrency, phone.manage) == (2, False)


def test_a_models_default_tag_may_be_left_out_of_the_list_or_written_into_it() -> None:
    assert Client(HASH, models=("mine",)).may_use("mine:latest")
    assert Client(HASH, models=("mine:latest",)).may_use("mine")
    assert not Client(HASH, models=("mine",)).may_use("mine:8b")


def test_a_client_without_a_list_may_use_every_model() -> None:
    assert Client(HASH).may_use("anything")


def test_without_a_file_there_is_nobody(tmp_path: Path) -> None:
    assert read(tmp_path / "keys.toml") == KeysFile()


@pytest.mark.parametrize(
    "text,says",
    [
        ("[clients.a]\n", "hash"),
        ('[clients.a]\nhash = "lm-secret"\n', "planner key"),
        (f'[clients.a]\nhash = "{HASH}"\n[clients.b]\nhash = "{HASH}"\n', "a has it"),
        (f'[clients.a]\nhash = "{HASH}"\nconcurrency = 0\n', "concurrency"),
        ("[keys]\n", "clients"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    (line,) = problems(text)
    assert says in line
