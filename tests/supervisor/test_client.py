"""The commands that talk to a running service, as a new user types them: right, wrong, through pipes, with keys."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from running_service import Serve, Service, environment, shared
from terminal import Terminal, read_until

from planner.errors import InvalidRequest
from supervisor.client.names import choose
from supervisor.client.service import service as service_of
from supervisor.client.tables import duration
from supervisor.client.transfer import Transfer

Planner = Callable[..., "subprocess.CompletedProcess[str]"]
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def unimpressed(
    llama_tools: Path,
    model_folder: Path,
    chat_model: Path,
    embedding_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """Return one service for everything that is asked wrongly, none of which changes anything."""
    with shared(environment(os.environ, model_folder, tmp_path_factory.mktemp("unimpressed"))) as service:
        yield service


@pytest.fixture
def planner(environ: dict[str, str]) -> Planner:
    """Return a function that runs the command against a service."""

    def run(service: Service | None, *words: str, piped: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        port = 1 if service is None else service.port
        return subprocess.run(
            [sys.executable, "-m", "planner", *words],
            input=piped,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
            env={**environ, "PLANNER_HOST": f"127.0.0.1:{port}", **more},
        )

    return run


def test_a_command_needs_no_more_settings_than_lead_to_the_service(unimpressed: Service, planner: Planner) -> None:
    done = planner(unimpressed, "ps", PLANNER_NUM_PARALLEL="many", PLANNER_KEEP_ALIVE="soon")
    assert (done.returncode, done.stderr) == (0, "")
    done = planner(unimpressed, "ps", PLANNER_HOST="127.0.0.1:port")
    assert done.returncode == 2
    assert "PLANNER_HOST" in done.stderr


def test_a_question_is_answered_by_a_model_that_part_of_its_name_stands_for(
    serve: Serve, planner: Planner, chat_model: Path, embedding_model: Path
) -> None:
    """The answer alone goes into the pipe; what was piped in follows the question."""
    service = serve()
    for words, piped in (
        (("run", "iny-ch", "hello"), ""),
        (("run", "TINY-CHAT"), "hello"),
        (("run", "chat", "a"), "b"),
    ):
        done = planner(service, *words, piped=piped)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(tiny_models.TEXT[:20])


def test_what_is_loaded_is_listed_unloaded_and_loaded_again(
    serve: Serve, planner: Planner, chat_model: Path, embedding_model: Path
) -> None:
    service = serve()
    assert planner(service, "load", "tiny-chat").stdout == "tiny-chat is loaded\n"
    (line,) = (line for line in planner(service, "ps").stdout.splitlines() if line.startswith("tiny-chat"))
    assert line.split()[1:4] == ["ready", "0/1", "4,096"]
    assert "tiny-embedding" in planner(service, "list").stdout
    assert "llama" in planner(service, "show", "tiny-chat").stdout
    assert "listening" in planner(service, "logs", "tiny-chat").stdout
    assert planner(service, "stop", "tiny-chat").stdout == "tiny-chat is unloaded\n"
    assert planner(service, "unload", "tiny-chat").stdout == "tiny-chat was not loaded\n"
    assert "ready" not in planner(service, "ps").stdout


@pytest.mark.parametrize(
    "words,status,says",
    [
        (("run", "tiny", "hello"), 2, "tiny could be tiny-chat, tiny-embedding"),
        (("run", "gpt-9", "hello"), 1, "there is no model 'gpt-9'"),
        (("run", "tiny-chat"), 2, "nothing to ask"),
        (("run", "tiny-chat", "--sytem", "x"), 2, "--sytem: no such flag"),
        (("load", "tiny-chat", "--keep-alive", "soon"), 1, "soon"),
        (("run",), 2, "which model? planner run MODEL"),
        (("cp", "tiny-chat"), 2, "which new name? planner cp NAME NEW_NAME"),
        (("key",), 2, "which name? planner key NAME"),
        (("ps", "all"), 2, "all: one word too many: planner ps"),
        (("yield", "CUDA0", "much"), 2, "8GiB"),
        (("yield", "CUDA9", "1GiB"), 1, "CUDA9"),
        (("yield",), 2, "which device? planner yield DEVICE"),
        (("yield", "CUDA0"), 2, "how much?"),
        (("yield", "CUDA9", "--end"), 1, "CUDA9"),
        (("yield", "Host", "1GiB", "--end"), 2, "--end takes the device alone"),
        (("rm", "nobody"), 1, "nobody"),
        (("rm", "tiny-chat"), 1, "a file of the models folder"),
        (("cp", "tiny-chat", "other"), 1, "a file of the models folder"),
        (("logs", "tiny-embedding"), 1, "tiny-embedding"),
    ],
)
def test_what_is_typed_wrong_is_told_in_one_line(
    unimpressed: Service, planner: Planner, words: tuple[str, ...], status: int, says: str
) -> None:
    done = planner(unimpressed, *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("planner: error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_is_made_of_a_modelfile_and_the_files_beside_it(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    """What the service has already is not sent again; FROM may name a model too."""
    service = serve()
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "weights.gguf").write_bytes(chat_model.read_bytes())
    (folder / "Modelfile").write_text("FROM ./weights.gguf\nPARAMETER temperature 0\n")
    (folder / "Second").write_text("FROM first\nSYSTEM be brief\n")
    done = planner(service, "create", "first", "-f", str(folder / "Modelfile"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()][:2] == ["reading", "sending"]
    assert done.stdout.endswith("success\n")
    assert "sending" not in planner(service, "create", "first", "-f", str(folder / "Modelfile")).stdout
    assert planner(service, "create", "second", "-f", str(folder / "Second")).returncode == 0
    assert "be brief" in planner(service, "show", "second").stdout
    assert planner(service, "run", "second", "hello").stdout.startswith(tiny_models.TEXT[:20])


@pytest.mark.parametrize(
    "text,says",
    [
        ("FROM ./nowhere.gguf\n", "there is no file"),
        ("FROM ./folder\n", "name the GGUF file in it"),
        ("FROM ./words.gguf\n", "no GGUF file"),
        ("FORM ./words.gguf\n", "(line 1)"),
        ("FROM nobody\n", "nobody"),
        (None, "-f names the Modelfile"),
    ],
)
def test_a_modelfile_that_cannot_be_made_is_told_in_one_line(
    unimpressed: Service, planner: Planner, tmp_path: Path, text: str | None, says: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "words.gguf").write_text("words")
    if text is not None:
        (tmp_path / "Modelfile").write_text(text)
    done = planner(unimpressed, "create", "new", "-f", str(tmp_path / "Modelfile"))
    assert done.returncode in {1, 2}
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_may_not_be_sent_is_refused_with_the_reason(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    """The service hangs up before all of it was sent."""
    service = serve(PLANNER_API_KEYS="first")
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(64 << 20)
    (tmp_path / "Modelfile").write_text("FROM ./large.gguf\n")
    done = planner(service, "create", "new", "-f", str(tmp_path / "Modelfile"), PLANNER_API_KEYS="second")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "key" in done.stderr


def test_without_a_service_each_command_says_how_to_start_one(planner: Planner) -> None:
    for words in (("ps",), ("run", "tiny", "hello"), ("pull", "tiny"), ("stop", "tiny")):
        done = planner(None, *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "planner serve" in done.stderr


@pytest.mark.parametrize(
    "listens,url",
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104 - not listened on
        (":9000", "http://127.0.0.1:9000"),
        ("[::]:9000", "http://[::1]:9000"),
        ("192.168.1.4", "http://192.168.1.4:11434"),
    ],
)
def test_who_listens_everywhere_is_reached_on_this_machine(listens: str, url: str) -> None:
    assert service_of({"OLLAMA_HOST": listens}).url == url


def test_who_means_another_service_in_words_that_cannot_be_read_is_told_which_one_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert service_of({"OLLAMA_HOST": "https://box"}).url == "http://127.0.0.1:11434"
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("planner: warning: OLLAMA_HOST: 'https://box' is not ")
    assert "127.0.0.1:11434" in told


def test_who_wants_memory_for_another_program_is_told_what_is_missing_and_whose_end_brings_it(
    serve: Serve, planner: Planner, endless_model: Path
) -> None:
    """The status tells scripts that it is not there yet."""
    service = serve(PLANNER_CONTEXT_LENGTH="32768")
    assert planner(service, "yield", "Host", "1MiB").returncode == 0
    assert planner(service, "yield", "Host", "--end").stdout == "Host: models are placed there again\n"
    assert planner(service, "yield", "Host", "--end").stdout == "Host: nothing was asked for there\n"
    body = {"model": "tiny-endless", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    with closing(HTTPConnection("127.0.0.1", service.port, timeout=WITHIN_S)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        assert connection.getresponse().read(10)
        done = planner(service, "yield", "Host", "1000TiB")
        assert service.runner()["state"] == "draining"
    service.read_log("runner.stopped")
    assert (done.returncode, done.stderr) == (3, "")
    given_back, missing, awaited = done.stdout.splitlines()
    assert given_back.startswith("Host: 0 B given back, ")
    assert missing.endswith("are still missing: what else is used there is not ours, or pinned")
    assert awaited.endswith("more when tiny-endless, which takes no new request, has finished what it serves")


def test_a_reader_that_has_enough_ends_the_answer_without_a_word(
    serve: Serve, environ: dict[str, str], endless_model: Path
) -> None:
    service = serve(PLANNER_CONTEXT_LENGTH="32768")
    process = subprocess.Popen(
        [sys.executable, "-m", "planner", "run", "endless", "hello"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environ, "PLANNER_HOST": f"127.0.0.1:{service.port}"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(20)
    process.stdout.close()
    assert (process.wait(WITHIN_S), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_bytes_that_are_no_text_are_asked_all_the_same(serve: Serve, environ: dict[str, str], chat_model: Path) -> None:
    service = serve()
    done = subprocess.run(
        [sys.executable, "-m", "planner", "run", "tiny-chat", b"na\xefve"],
        input=b"\xff caf\xe9",
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
        env={**environ, "PLANNER_HOST": f"127.0.0.1:{service.port}", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    serve: Serve, terminal: Terminal, endless_model: Path
) -> None:
    service = serve(PLANNER_CONTEXT_LENGTH="32768")
    process, screen = terminal(service, "run", "endless")
    read_until(screen, ">>> ")
    os.write(screen, b"hello\n")
    read_until(screen, tiny_models.TEXT.split()[-1])
    process.send_signal(signal.SIGINT)
    read_until(screen, "(stopped)\r\n>>> ")
    os.write(screen, b"/bye\n")
    assert process.wait(WITHIN_S) == 0


def test_a_key_lets_its_holder_in_once_the_service_has_read_the_file_again(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    service = serve(PLANNER_KEYS_FILE=str(keys), PLANNER_API_KEYS="first")
    key = planner(service, "key", "laptop", PLANNER_KEYS_FILE=str(keys)).stdout.strip()
    assert planner(service, "list", PLANNER_API_KEYS=key).returncode == 1
    service.process.send_signal(signal.SIGHUP)
    service.read_log("config.reloaded")
    assert planner(service, "list", PLANNER_API_KEYS=key).returncode == 0
    assert "needed" in planner(service, "list").stderr
    assert key not in keys.read_text()


def test_who_takes_the_last_key_out_of_the_file_lets_nobody_in(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    planner(None, "key", "laptop", PLANNER_KEYS_FILE=str(keys))
    service = serve(PLANNER_KEYS_FILE=str(keys))
    keys.write_text("")
    service.process.send_signal(signal.SIGHUP)
    service.read_log("config.reloaded")
    assert "needed" in planner(service, "list").stderr


def test_a_file_with_a_mistake_changes_nothing_in_a_running_service(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    """``systemctl reload`` cannot fail, so ``systemctl status`` says that it did."""
    keys = tmp_path / "keys.toml"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(WITHIN_S)
        service = serve(PLANNER_KEYS_FILE=str(keys), PLANNER_API_KEYS="first", NOTIFY_SOCKET=str(tmp_path / "notify"))
        keys.write_text("[clients.laptop]\nhash = 1\n")
        service.process.send_signal(signal.SIGHUP)
        (problem,) = service.read_log("config.not_reloaded")["problems"]
        heard = [systemd.recv(1000).decode() for _ in range(3)]
    assert "laptop" in problem
    assert heard[1].startswith("RELOADING=1\n")
    assert heard[2] == f"READY=1\nSTATUS=not reloaded: {problem}"
    assert planner(service, "list", PLANNER_API_KEYS="first").returncode == 0


def test_with_a_certificate_the_service_speaks_tls_and_its_own_commands_trust_it(
    serve: Serve, planner: Planner, chat_model: Path, tmp_path: Path
) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = ("openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=somewhere", "-days", "2")
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    service = serve(PLANNER_TLS_CERT=certificate, PLANNER_TLS_KEY=key)
    done = planner(service, "run", "tiny-chat", "hello", PLANNER_TLS_CERT=certificate)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(tiny_models.TEXT[:20])
    assert planner(service, "ps").returncode == 1


@given(st.lists(st.text("ab-:", min_size=1, max_size=6), max_size=5), st.text("ab-", min_size=1, max_size=4))
def test_a_name_stands_for_the_one_model_that_it_is_part_of(ids: list[str], name: str) -> None:
    try:
        chosen = choose(name, ids)
    except InvalidRequest:
        assert sum(name in each for each in ids) > 1
    else:
        assert chosen == name or name in chosen


@pytest.mark.parametrize(
    "seconds,said", [(0.2, "1 second"), (59, "59 seconds"), (61, "1 minute"), (7200, "2 hours"), (200_000, "2 days")]
)
def test_spans_are_told_in_their_largest_unit(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_parts_that_come_side_by_side_take_a_line_each_in_a_pipe() -> None:
    out = io.StringIO()
    steps = [
        {"status": f"pulling {part}", "digest": part, "completed": n, "total": 9} for n in range(3) for part in "ab"
    ]
    Transfer(out, is_terminal=False).follow(map(json.dumps, [*steps, {"status": "success"}]))
    assert out.getvalue().splitlines() == ["pulling a", "pulling b", "success"]
