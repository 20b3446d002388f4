"""Models made, copied and deleted, and blobs taken in: nothing is left over, and nothing that is used is lost."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import companion_models
import pytest
from store_layout import HOST, digest_of, put_blob, put_model, said, tree

from planner.model import read_model
from supervisor.api.store import BadCreate, BadModelName, CreateRequest, NotInStore, StoreError, StoreFull
from supervisor.models.catalogue import ModelEntry
from supervisor.store import writing
from supervisor.store.folder import StoreFolder
from supervisor.store.listing import scan
from supervisor.store.store import ModelStore

pytestmark = pytest.mark.anyio


async def sent(data: bytes, pieces: int = 3) -> AsyncIterator[bytes]:
    step = -(-len(data) // pieces)
    for start in range(0, len(data), step):
        yield data[start : start + step]


def models(folder: StoreFolder) -> dict[str, ModelEntry]:
    return {str(entry.id): entry for entry in scan(folder, read_model)}


async def test_a_model_is_made_of_a_blob_that_was_sent_and_of_a_modelfile(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    digest = digest_of(gguf)
    assert not await store.has_blob(digest)
    await store.put_blob(digest, sent(gguf))
    assert await store.has_blob(digest)
    text = 'FROM ./tiny.gguf\nSYSTEM Be terse.\nPARAMETER stop "</s>"\nPARAMETER top_k 3\nMESSAGE user hi\nLICENSE MIT'
    steps = await said(
        store.create(CreateRequest("me/tiny:1", files={"./tiny.gguf": digest}, modelfile=text, parameters={"top_k": 5}))
    )
    assert steps[:2] == ["parsing GGUF", f"using existing layer {digest}"]
    assert steps[-2:] == ["writing manifest", "success"]
    entry = models(folder)["me/tiny:1"]
    assert entry.problem is None
    assert entry.path == str(folder.blob(digest))
    assert entry.preset.system == "Be terse."
    assert entry.preset.parameters == {"stop": ["</s>"], "top_k": 5}
    assert entry.preset.messages == ({"role": "user", "content": "hi"},)
    assert entry.preset.licenses == ("MIT",)


async def test_a_model_made_of_another_shares_its_blobs_and_keeps_what_is_not_said_anew(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    layers = [
        ("model", gguf),
        ("system", b"old"),
        ("template", b"{{ .Prompt }}"),
        ("params", b'{"top_k": 1, "seed": 2}'),
    ]
    put_model(folder.root, f"{HOST}/library/Parent/1", [*layers, ("license", b"MIT")])
    await said(
        store.create(
            CreateRequest("child", parent="parent:1", system="new", parameters={"top_k": 9}, licenses=("of mine",))
        )
    )
    entry = models(folder)["child:latest"]
    assert entry.path == models(folder)["Parent:1"].path
    assert entry.preset.parent == "Parent:1"
    assert (entry.preset.system, entry.preset.template) == ("new", "{{ .Prompt }}")
    assert entry.preset.parameters == {"top_k": 9, "seed": 2}
    assert entry.preset.licenses == ("MIT", "of mine")


async def test_an_adapter_and_a_projector_become_what_their_headers_say(
    gguf: bytes, chat_model: Path, store: ModelStore, folder: StoreFolder, tmp_path: Path
) -> None:
    companion_models.write_lora(tmp_path / "lora", chat_model)
    companion_models.write_projector(tmp_path / "projector", n_embd_text=64)
    lora, projector = ((tmp_path / name).read_bytes() for name in ("lora", "projector"))
    for data in (gguf, lora, projector):
        await store.put_blob(digest_of(data), sent(data))
    files = {"model": digest_of(gguf), "projector": digest_of(projector)}
    await said(store.create(CreateRequest("all", files=files, adapters={"lora": digest_of(lora)})))
    entry = models(folder)["all:latest"]
    assert entry.problem is None
    assert entry.mmproj == str(folder.blob(digest_of(projector)))
    assert entry.adapters == (str(folder.blob(digest_of(lora))),)


@pytest.mark.parametrize(
    "spec,problem",
    [
        (CreateRequest("a"), "neither 'from' or 'files'"),
        (CreateRequest("a", modelfile="FROM /etc/passwd"), "'/etc/passwd' is no file of this request"),
        (CreateRequest("a", modelfile="FROM ../../secret.gguf"), "is no file of this request"),
        (CreateRequest("a", modelfile="FROM b\nADAPTER ~/lora"), "'~/lora' is no file of this request"),
        (CreateRequest("a", files={"x": "sha256:../../etc/passwd"}), "invalid digest format"),
        (CreateRequest("a", files={"x": digest_of(b"text")}), "no GGUF file"),
        (CreateRequest("a", parent="b", parameters={"colour": 1}), "unknown parameter 'colour'"),
        (CreateRequest("a", parent="b", parameters={"top_k": "many"}), "invalid int value 'many'"),
        (CreateRequest("a", parent="b", quantize="q4_0"), "quantize"),
        (CreateRequest("a", modelfile="FORM b"), r"\(line 1\): command must be one of"),
    ],
)
async def test_what_makes_no_model_is_refused_with_its_reason(
    spec: CreateRequest, problem: str, store: ModelStore, folder: StoreFolder
) -> None:
    put_blob(folder.root, b"text")
    with pytest.raises(BadCreate, match=problem):
        await said(store.create(spec))
    assert models(folder) == {}


async def test_a_blob_that_is_not_there_and_a_parent_that_nobody_has_are_named(store: ModelStore) -> None:
    with pytest.raises(NotInStore, match=digest_of(b"never sent")):
        await said(store.create(CreateRequest("a", files={"x": digest_of(b"never sent")})))
    with pytest.raises(BadModelName, match="of no registry"):
        await said(store.create(CreateRequest("a", parent="nosuch")))


@pytest.mark.parametrize("name", ["../a", "a/../../b", ".a", "a b", ""])
async def test_no_name_that_is_none_gets_into_the_store(
    name: str, gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    put_model(folder.root, f"{HOST}/library/a/latest", [("model", gguf)])
    before = tree(folder.root)
    for attempt in (store.copy("a", name), store.delete(name), said(store.create(CreateRequest(name, parent="a")))):
        with pytest.raises(BadModelName):
            await attempt
    assert tree(folder.root) == before


async def test_a_copy_is_a_second_name_and_a_delete_takes_only_what_nobody_else_needs(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    put_model(folder.root, f"{HOST}/library/a/latest", [("model", gguf), ("system", b"shared")])
    put_model(folder.root, f"{HOST}/library/b/latest", [("model", gguf), ("system", b"of b alone")])
    await store.copy("A", "copies/of-a:2")
    assert models(folder)["copies/of-a:2"].digest == models(folder)["a:latest"].digest
    await store.copy("a", "Copies/OF-A:2")
    assert len(models(folder)) == 3, "a name that differs only in its case is the same one"
    await store.delete("B:latest")
    assert sorted(models(folder)) == ["a:latest", "copies/of-a:2"]
    assert not folder.blob(digest_of(b"of b alone")).exists()
    assert not (folder.root / "manifests" / HOST / "library" / "b").exists()
    await store.delete("a")
    assert all(entry.problem is None for entry in models(folder).values())
    await store.delete("copies/of-a:2")
    assert list(folder.blobs.iterdir()) == []
    with pytest.raises(NotInStore, match="model 'a' not found"):
        await store.delete("a")
    with pytest.raises(NotInStore):
        await store.copy("a", "b")


async def test_nothing_is_removed_while_one_manifest_cannot_be_read(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    put_model(folder.root, f"{HOST}/library/a/latest", [("model", gguf)])
    put_model(folder.root, f"{HOST}/library/torn/latest", [("model", gguf)]).write_text("{")
    await store.delete("a")
    assert folder.blob(digest_of(gguf)).exists()
    await store.delete("torn")
    assert sorted(models(folder)) == []


async def test_what_no_model_uses_stays_for_its_grace_and_goes_with_the_next_delete(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    put_model(folder.root, f"{HOST}/library/a/latest", [("model", gguf)])
    new, old = put_blob(folder.root, b"just sent"), put_blob(folder.root, b"sent long ago")
    past = time.time() - 2 * writing.GRACE_S
    os.utime(folder.blob(old), (past, past))
    (folder.blobs / "somebody-elses").write_text("x")
    os.utime(folder.blobs / "somebody-elses", (0, 0))
    await store.delete("a")
    assert sorted(path.name for path in folder.blobs.iterdir()) == sorted(["somebody-elses", new.replace(":", "-")])


async def test_nothing_is_removed_while_somebody_adds(gguf: bytes, store: ModelStore, folder: StoreFolder) -> None:
    put_model(folder.root, f"{HOST}/library/a/latest", [("model", gguf)])
    with writing.adding(folder):
        await store.delete("a")
    assert folder.blob(digest_of(gguf)).exists()


async def test_a_blob_with_another_digest_is_refused_and_leaves_nothing(store: ModelStore, folder: StoreFolder) -> None:
    with pytest.raises(BadCreate, match="digest mismatch"):
        await store.put_blob(digest_of(b"one thing"), sent(b"another"))

    async def broken() -> AsyncIterator[bytes]:
        yield b"one "
        raise ConnectionResetError

    with pytest.raises(StoreError):
        await store.put_blob(digest_of(b"one thing"), broken())
    assert list(folder.blobs.iterdir()) == []


async def test_a_store_that_may_not_be_written_to_is_one_line(
    gguf: bytes, folder: StoreFolder, store: ModelStore
) -> None:
    folder.root.parent.joinpath("store").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="check PLANNER_STORE") as caught:
        await store.put_blob(digest_of(gguf), sent(gguf))
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_files() -> Iterator[int]:
    """Let no file of this process grow beyond so many bytes: what a full disk says of any other size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    yield 4 << 20
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_disk_that_is_full_is_told_and_keeps_nothing_of_what_was_sent(
    small_files: int, store: ModelStore, folder: StoreFolder
) -> None:
    data = bytes(2 * small_files)
    with pytest.raises(StoreFull, match="is full"):
        await store.put_blob(digest_of(data), sent(data))
    assert list(folder.blobs.iterdir()) == []


async def test_a_model_of_another_host_gives_no_other_model_another_name(
    gguf: bytes, store: ModelStore, folder: StoreFolder
) -> None:
    """Also where that host comes first in any order, and the next service asks."""
    put_model(folder.root, f"{HOST}/library/old/latest", [("model", gguf)])
    await store.copy("old", "new")
    put_model(folder.root, "a.example.org/library/other/latest", [("model", gguf)])
    names = ["a.example.org/library/other:latest", "new:latest", "old:latest"]
    assert list(models(folder)) == names
    assert list(models(StoreFolder(folder.root))) == names
