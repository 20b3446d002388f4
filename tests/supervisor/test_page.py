"""The page as a reader meets it: in a real browser, over a real service."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from browser import Page, chromium, tab
from running_service import Serve

WITHOUT = "no chromium here: the page is not tried in a browser (Debian: apt-get install chromium)"

pytestmark = [pytest.mark.llama, pytest.mark.anyio, pytest.mark.skipif(not shutil.which("chromium"), reason=WITHOUT)]

# Two more answers of /status have come and been drawn: the page asks again only after it has drawn.
TWO_REFRESHES = """new Promise((resolve) => {
  let seen = 0;
  new PerformanceObserver((list) => {
    seen += list.getEntries().filter((entry) => entry.name.endsWith("/status")).length;
    if (seen > 1) resolve(true);
  }).observe({ type: "resource" });
})"""
TOO_WIDE = "[...document.querySelectorAll('*')].filter((one) => one.scrollWidth > innerWidth).length"


@pytest.fixture(scope="module")
def devtools() -> Iterator[str]:
    with chromium() as address:
        yield address


@pytest.fixture
async def page(devtools: str) -> AsyncIterator[Page]:
    async with tab(devtools) as opened:
        yield opened


async def test_it_shows_devices_models_and_runners_as_they_come(
    page: Page, serve: Serve, chat_model: Path, rpc_workers: object
) -> None:
    service = serve(PLANNER_RPC_SERVERS=",".join(one.endpoint for one in rpc_workers(3)))  # type: ignore[operator]
    await page.open(f"http://127.0.0.1:{service.port}/")
    assert await page.text("#overall") == "ready"
    devices = await page.text("#devices")
    assert all(name in devices for name in ("RPC0", "RPC1", "RPC2", "Main memory"))
    assert "No model is loaded" in await page.text("#runners")
    assert "loaded on first request" in await page.text("#models")
    service.chat("tiny-chat").read()
    await page.until("document.querySelector('#runners .good')")
    runner = service.runner()
    shown = await page.text("#runners")
    assert "ready for requests" in shown
    assert str(runner["pid"]) in shown
    assert "tiny-chat" in await page.text("#devices")
    await page.until("/\\d tokens, [\\d.,]+ per second/.test(document.querySelector('#models').textContent)")
    await page.click("#runners summary")
    assert f"--model {chat_model}" in (await page.text("#runners pre")).replace(" -m ", " --model ")
    assert page.complaints == []


async def test_what_did_not_change_is_not_drawn_again(page: Page, serve: Serve, chat_model: Path) -> None:
    service = serve(PLANNER_DEBUG="1")
    service.chat("tiny-chat").read()
    service.read_log("machine.read")  # a little after the load, and what is free is another figure then
    while service.model("tiny-chat")["tokens"] is None:
        pass  # likewise, and each question takes its time
    await page.open(f"http://127.0.0.1:{service.port}/")
    marked = "document.querySelectorAll('#devices > *, #runners > *, #models > *, #model-rows > *')"
    count = await page.value(f"{marked}.forEach((one) => {{ one.marked = true; }}), {marked}.length")
    assert count >= 4
    assert await page.value(TWO_REFRESHES)
    assert await page.value(f"[...{marked}].filter((one) => one.marked).length") == count


async def test_it_asks_for_a_key_and_works_with_one(page: Page, serve: Serve, chat_model: Path) -> None:
    service = serve(PLANNER_API_KEYS="open-sesame")
    await page.open(f"http://127.0.0.1:{service.port}/")
    assert await page.text("#overall") == "locked"
    assert "API key" in await page.text("#login")
    assert not await page.value("document.querySelector('#content').checkVisibility()")
    for key, shown in (("wrong", "this key is not accepted"), ("open-sesame", "ready")):
        await page.click("#secret")
        await page.type(key)
        await page.click("#login button")
        await page.until(f"document.querySelector('#overall').textContent === {shown!r}")
    assert "tiny-chat" in await page.text("#models")
    assert not await page.value("document.querySelector('#login').checkVisibility()")
    assert [line for line in page.complaints if "401" not in line] == []


async def test_a_hostile_name_is_text_and_nothing_else(
    page: Page, serve: Serve, chat_model: Path, tmp_path: Path
) -> None:
    name = "<img src=x onerror=document.title='taken'>&lt;b"
    (tmp_path / "folder").mkdir()
    shutil.copy(chat_model, tmp_path / "folder" / f"{name}.gguf")
    service = serve(PLANNER_MODELS=str(tmp_path / "folder"))
    service.chat(name).read()
    await page.open(f"http://127.0.0.1:{service.port}/")
    assert name in await page.text("#models")
    assert name in await page.text("#runners")
    assert await page.value("document.querySelectorAll('img, main b').length") == 0
    assert await page.value("document.title") == "Loadmaster"
    assert page.complaints == []


async def test_it_fits_a_telephone_and_a_dark_room(
    page: Page, serve: Serve, chat_model: Path, model_folder: Path
) -> None:
    service = serve()
    service.chat("tiny-chat").read()
    lightness = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))"
    for scheme, width in (("light", 1100), ("dark", 360)):
        await page.show_as(width=width, scheme=scheme)
        await page.open(f"http://127.0.0.1:{service.port}/")
        assert await page.value(TOO_WIDE) == 0
        assert (await page.value(lightness) > 128) == (scheme == "light")
