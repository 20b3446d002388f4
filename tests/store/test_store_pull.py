"""Pulls from a real registry: killed, resumed, refused, out of disk, shared."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from pathlib import Path

import anyio
import pytest
from docker_registry import RegistryServer
from store_layout import digest_of, said, tree

from supervisor.api.store import BadModelName, Progress, RegistryFailed, StoreFull
from supervisor.store.folder import StoreFolder
from supervisor.store.store import ModelStore

MIB = 1 << 20
BIG_BYTES = 200 * MIB
CONFIG = b"{}"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def big_model(registry: RegistryServer, chat_model: Path) -> bytes:
    """Return 200 MB that begin as a GGUF file and repeat nowhere, pushed as ``big:1``."""
    head = chat_model.read_bytes()
    data = head + random.Random(7).randbytes(BIG_BYTES - len(head))  # noqa: S311 - no secret
    registry.push("library/big:1", {"model": data, "template": b"{{ .Prompt }}", "config": CONFIG})
    return data


@pytest.fixture
def small(registry: RegistryServer, chat_model: Path) -> str:
    """Return the digest of a small model, pushed as ``small:1``."""
    layers = {"model": chat_model.read_bytes(), "template": b"{{ .Prompt }}", "config": CONFIG}
    return registry.push("library/small:1", layers)["model"]


class Puller:
    """A pull in a process of its own, which stands still until it is told to go on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def until(self, status: str, completed: int = 0) -> str:
        """Let it go on to this status, and so many bytes; return what it then said of them."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        while True:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            told, _, count = self.process.stdout.readline().strip().partition("|")
            if told.startswith(status) and (not completed or (count.isdigit() and int(count) >= completed)):
                return count
            assert told not in {"", "error"}, f"it ended before {status}: {count}"

    def finish(self) -> None:
        """Let it go on to its end."""
        self.process.communicate("\n")


@contextmanager
def puller(folder: StoreFolder, registry: RegistryServer, name: str, *prefix: str) -> Iterator[Puller]:
    command = [*prefix, sys.executable, str(Path(__file__).with_name("pulling.py")), str(folder.root)]
    command += [f"http://{registry.host}", name]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT
    ) as process:
        try:
            yield Puller(process)
        finally:
            process.kill()


def names(folder: StoreFolder) -> list[str]:
    return [str(name).partition("/")[2] for name in folder.names()]


def test_a_big_pull_that_is_killed_twice_goes_on_where_it_was_and_shows_nothing_before_it_is_whole(
    registry: RegistryServer, big_model: bytes, folder: StoreFolder
) -> None:
    blob = folder.blob(digest_of(big_model))
    status = f"pulling {digest_of(big_model)[7:19]}"
    reached = 0
    for stop_at in (40 * MIB, 110 * MIB):
        with puller(folder, registry, "big:1") as pull:
            first = int(pull.until(status, 1 if reached else 0))
            assert first >= reached, "what an earlier process has written is not fetched again"
            reached = first if first >= stop_at else int(pull.until(status, stop_at))
            assert reached < BIG_BYTES
            pull.process.send_signal(signal.SIGKILL)
            pull.process.wait()
        assert names(folder) == []
        assert not blob.exists()
    with puller(folder, registry, "big:1") as pull:
        assert int(pull.until(status, 1)) >= reached
        pull.until("verifying sha256 digest")
        assert names(folder) == []
        assert not blob.exists()
        pull.until("writing manifest")
        assert names(folder) == []
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest_of(big_model).removeprefix("sha256:")
        pull.until("success")
    assert names(folder) == ["library/big:1"]
    assert not [path.name for path in folder.blobs.iterdir() if path.name.startswith("partial-")]


@pytest.mark.anyio
async def test_a_pull_says_what_it_does_in_ollamas_words(
    registry: RegistryServer, small: str, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    async with ModelStore(StoreFolder(tmp_path, f"http://{registry.host}")) as store:
        steps = [step async for step in store.pull("small:1", insecure=False)]
        again = await said(store.pull("small:1", insecure=False))
    assert steps[0] == Progress("pulling manifest")
    size_bytes = StoreFolder(tmp_path).blob(small).stat().st_size
    assert Progress(f"pulling {small[7:19]}", small, size_bytes, size_bytes) in steps
    assert [step.status for step in steps[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
    assert "verifying sha256 digest" not in again
    assert again[-1] == "success"


@pytest.mark.anyio
async def test_a_wrong_digest_is_refused_and_leaves_nothing(
    registry: RegistryServer, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    digest = registry.push("library/bent:1", {"model": b"GGUF" + b"x" * MIB, "config": CONFIG})["model"]
    with registry.blob_file(digest).open("r+b") as file:
        file.seek(1000)
        file.write(b"y")
    folder = StoreFolder(tmp_path, f"http://{registry.host}")
    async with ModelStore(folder) as store:
        with pytest.raises(RegistryFailed, match=f"digest mismatch, file must be downloaded again: want {digest}"):
            await said(store.pull("bent:1", insecure=False))
    assert names(folder) == []
    assert not [path for path in tree(tmp_path) if digest[7:] in path]


def mounting() -> list[str]:
    """Return a command that runs another one where it may mount; skip where nobody may."""
    command = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no namespaces here: no disk is filled (Debian: util-linux; a container may forbid them)")
    return command


def on_a_disk_of(size: str, folder: StoreFolder, then: str = "") -> list[str]:
    """Return a command that runs another one with the store on a disk of this size, and lists then what is on it."""
    script = f'mount -t tmpfs -o size={size} none "$0" && "$@"; {then or "true"}; cd "$0" && find . -type f >&2'
    folder.root.mkdir(parents=True)
    return [*mounting(), "sh", "-c", script, str(folder.root)]


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    registry: RegistryServer, big_model: bytes, folder: StoreFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    with puller(folder, registry, "big:1", *on_a_disk_of("64m", folder)) as pull:
        problem = pull.until("error")
        pull.finish()
    assert problem.startswith(f"StoreFull: the disk of {folder.root} is too full: 209,715,2")
    assert capfd.readouterr().err.split() == ["./.lock"], "nothing is left of it"


def test_a_disk_that_fills_up_in_the_middle_is_told_and_nothing_is_left_behind(
    registry: RegistryServer, big_model: bytes, folder: StoreFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    with puller(folder, registry, "big:1", *on_a_disk_of("220m", folder)) as pull:
        pull.until(f"pulling {digest_of(big_model)[7:19]}", 20 * MIB)
        inside = f"/proc/{pull.process.pid}/root{folder.root}/somebody-elses"
        Path(inside).write_bytes(b"x" * 100 * MIB)
        problem = pull.until("error")
        pull.finish()
    assert problem.startswith(f"StoreFull: the disk of {folder.root} is full (No space left on device)")
    assert sorted(capfd.readouterr().err.split()) == ["./.lock", "./somebody-elses"]


@pytest.mark.parametrize("how", ["redirect", "token"])
def test_a_public_server_leads_to_nothing_on_our_own_network(
    how: str, tmp_path: Path, free_environment: dict[str, str]
) -> None:
    command = ["unshare", "--map-root-user", "--net"]
    script = [sys.executable, str(Path(__file__).with_name("leading_inside.py")), str(tmp_path), how]
    if not shutil.which("ip") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no networks of one's own here (Debian: util-linux, iproute2; a container may forbid them)")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *script], check=True, stdout=subprocess.PIPE, text=True, env=environ)
    told = done.stdout.splitlines()
    assert "127.0.0.1 is of a private network" in told[0]
    assert told[-1] == "asked inside: []"


def test_two_processes_that_pull_one_model_into_one_store_share_the_work(
    registry: RegistryServer, big_model: bytes, folder: StoreFolder
) -> None:
    with puller(folder, registry, "big:1") as first, puller(folder, registry, "big:1") as second:
        first.until(f"pulling {digest_of(big_model)[7:19]}", 20 * MIB)
        second.until("waiting for another download")
        first.until("success")
        second.until("success")
    assert hashlib.sha256(folder.blob(digest_of(big_model)).read_bytes()).hexdigest() in digest_of(big_model)


@pytest.mark.anyio
async def test_clients_that_ask_for_one_model_follow_one_pull_and_the_last_to_leave_ends_it(
    registry: RegistryServer, big_model: bytes, folder: StoreFolder, free_environment: dict[str, str]
) -> None:
    folder = StoreFolder(folder.root, f"http://{registry.host}")
    async with ModelStore(folder) as store, AsyncExitStack() as leaving:
        steps = [await leaving.enter_async_context(aclosing(_pull(store, "big:1"))) for _ in range(3)]
        assert [await anext(each) for each in steps] == [Progress("pulling manifest")] * 3
        await steps[0].aclose()
        async for step in steps[1]:
            if step.completed is not None and 10 * MIB < step.completed < BIG_BYTES:
                break
        await steps[1].aclose()
        assert (await anext(steps[2])).status.startswith("pulling")
        await steps[2].aclose()
        assert names(folder) == []
        assert [path for path in tree(folder.root) if "partial-" in path], "what was fetched is kept to be resumed"
        assert (await said(store.pull("big:1", insecure=False)))[-1] == "success"
    assert names(folder) == ["library/big:1"]


def _pull(store: ModelStore, name: str) -> AsyncIterator[Progress]:
    return store.pull(name, insecure=False)


@pytest.mark.anyio
async def test_a_new_version_takes_the_old_ones_place_and_its_unused_blobs(
    registry: RegistryServer, chat_model: Path, folder: StoreFolder, free_environment: dict[str, str]
) -> None:
    folder = StoreFolder(folder.root, f"http://{registry.host}")
    old = registry.push("library/moving:1", {"model": chat_model, "system": b"old", "config": CONFIG})
    async with ModelStore(folder) as store:
        await said(store.pull("moving:1", insecure=False))
        new = registry.push("library/moving:1", {"model": chat_model, "system": b"new", "config": CONFIG})
        assert "removing unused layers" in await said(store.pull("moving:1", insecure=False))
    assert folder.blob(new["model"]).exists()
    assert folder.blob(new["system"]).exists()
    assert not folder.blob(old["system"]).exists()


@pytest.mark.anyio
async def test_what_the_registry_has_not_is_said_and_nothing_is_made(
    registry: RegistryServer, folder: StoreFolder, free_environment: dict[str, str]
) -> None:
    async with ModelStore(StoreFolder(folder.root, f"http://{registry.host}")) as store:
        with pytest.raises(RegistryFailed, match="pull model manifest: file does not exist"):
            await said(store.pull("nosuch:1", insecure=False))
    assert not folder.root.exists()


@pytest.mark.anyio
async def test_plain_http_is_only_spoken_where_it_was_allowed(
    registry: RegistryServer, small: str, store: ModelStore, folder: StoreFolder
) -> None:
    full = f"{registry.host}/library/small:1"
    with pytest.raises(BadModelName, match="insecure protocol http"):
        await said(store.pull(f"http://{full}", insecure=False))
    with anyio.fail_after(60), pytest.raises(RegistryFailed):
        await said(store.pull(full, insecure=False))
    assert names(folder) == []
    assert (await said(store.pull(full, insecure=True)))[-1] == "success"
    assert names(folder) == ["library/small:1"]


@pytest.mark.anyio
async def test_a_name_without_a_host_needs_a_registry(store: ModelStore, folder: StoreFolder) -> None:
    with pytest.raises(BadModelName, match="set PLANNER_REGISTRY"):
        await said(store.pull("llama3.2", insecure=False))
    assert not folder.root.exists()


@pytest.mark.anyio
async def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path: Path, free_environment: dict[str, str]) -> None:
    async with ModelStore(StoreFolder(tmp_path, "http://127.0.0.1:1")) as store:
        with pytest.raises(RegistryFailed, match=r"127\.0\.0\.1") as caught:
            await said(store.pull("a", insecure=False))
    assert "\n" not in str(caught.value)
    assert not issubclass(caught.type, StoreFull)
