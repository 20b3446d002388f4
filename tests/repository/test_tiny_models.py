"""The models made by hand, in the real llama-server: they answer what they were made to answer."""

import http.client
import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_models

PROMPT = "Grüße, 你好 🙂\nwho are you?"


@contextmanager
def served(llama_tools: Path, model: Path, *arguments: str) -> Iterator[str]:
    """Run llama-server on a port of the system's choice and yield its address."""
    command = [
        str(llama_tools / "llama-server"),
        "-m",
        str(model),
        "--port",
        "0",
        "--fit",
        "off",
        "-t",
        "1",
        *arguments,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={}) as server:
        try:
            assert server.stdout is not None
            lines = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"listening on http://(\S+)", line):
                    yield found[1]
                    break
            else:
                pytest.fail("".join(lines))
        finally:
            server.kill()


def ask(address: str, path: str, body: dict[str, object]) -> Any:
    """Post JSON and return the answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    with closing(connection), connection.getresponse() as answer:
        assert answer.status == 200, answer.read()
        return json.load(answer)


def chat(address: str, **options: object) -> tuple[str, str]:
    """Return the answer to the prompt and why it ended."""
    answer = ask(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], **options})
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def cosine(left: list[float], right: list[float]) -> float:
    """Return how close two vectors lie: 1 is the same direction."""
    return sum(a * b for a, b in zip(left, right, strict=True)) / math.hypot(*left) / math.hypot(*right)


@pytest.mark.llama
def test_the_chat_model_says_its_text_at_any_temperature(llama_tools: Path, chat_model: Path) -> None:
    with served(llama_tools, chat_model) as address:
        answers = {chat(address, **options) for options in ({"temperature": 0}, {}, {"temperature": 1.5, "top_k": 0})}
        assert answers == {(tiny_models.TEXT, "stop")}


@pytest.mark.llama
def test_any_text_becomes_tokens_and_text_again(llama_tools: Path, chat_model: Path) -> None:
    with served(llama_tools, chat_model) as address:
        tokens = ask(address, "/tokenize", {"content": PROMPT})["tokens"]
        assert ask(address, "/detokenize", {"tokens": tokens})["content"] == f" {PROMPT}"


@pytest.mark.llama
def test_layers_of_unequal_types_change_nothing_in_the_text(llama_tools: Path, tmp_path: Path) -> None:
    path = tmp_path / "unequal.gguf"
    types = ("F16", "Q8_0", "Q4_0", "F32", "Q5_0", "BF16")
    tiny_models.write_chat_model(path, n_layer=6, n_embd=128, n_vocab=1000, layer_types=types, text="One two three.")
    with served(llama_tools, path) as address:
        assert chat(address) == ("One two three.", "stop")
    reader = gguf.GGUFReader(path)
    assert [t.tensor_type.name for t in reader.tensors if t.name.endswith("ffn_up.weight")] == list(types)


@pytest.mark.llama
def test_the_endless_model_goes_on_until_it_is_cut_off(llama_tools: Path, endless_model: Path) -> None:
    with served(llama_tools, endless_model) as address:
        text, reason = chat(address, max_tokens=100)
        assert reason == "length"
        assert text.startswith(f"{tiny_models.TEXT} {tiny_models.TEXT} Hello!")


@pytest.mark.llama
def test_texts_that_share_words_get_vectors_that_lie_close(llama_tools: Path, embedding_model: Path) -> None:
    texts = ["the cat sat on the mat", "a cat sits on a mat", "Quantum chromodynamics!"]
    with served(llama_tools, embedding_model, "--embeddings") as address:
        same, close, far = (entry["embedding"] for entry in ask(address, "/v1/embeddings", {"input": texts})["data"])
    assert cosine(same, close) > cosine(same, far)


@pytest.mark.llama
def test_the_rerank_model_scores_each_document(llama_tools: Path, rerank_model: Path) -> None:
    with served(llama_tools, rerank_model, "--reranking") as address:
        results = ask(address, "/v1/rerank", {"query": "cats", "documents": ["a cat", "physics", "a cat"]})["results"]
    scores = {result["index"]: result["relevance_score"] for result in results}
    assert scores[0] == pytest.approx(scores[2])
    assert scores[0] != pytest.approx(scores[1])


def test_a_word_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every word of the text must differ"):
        tiny_models.write_chat_model(tmp_path / "twice.gguf", text="one and one")


def test_the_large_header_has_its_full_length_and_takes_little_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    tiny_models.write_large_vocabulary_header(path, n_vocab=2048)
    tensors = gguf.GGUFReader(path).tensors
    size = path.stat()
    assert size.st_size >= max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors)
    assert size.st_blocks * 512 < 1_000_000


def test_the_small_models_are_small(chat_model: Path, embedding_model: Path, rerank_model: Path) -> None:
    assert all(path.stat().st_size < 1_000_000 for path in (chat_model, embedding_model, rerank_model))
