"""A registry at a public address that leads to this machine, and a pull from it, in a network of their own.

Prints what became of the pull, and what the server inside was asked.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from aiohttp import web
from web_server import Answer

from supervisor.api.store import RegistryFailed
from supervisor.store.folder import StoreFolder
from supervisor.store.store import ModelStore

PUBLIC = "8.8.8.8"


async def listening(address: str, answer: Answer) -> int:
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, address, 0).start()
    return int(runner.addresses[0][1])


async def main(root: str, how: str) -> None:
    asked = []

    async def inside(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"token": "secret"})

    port = await listening("127.0.0.1", inside)
    target = f"http://127.0.0.1:{port}/inside"

    async def outside(_request: web.Request) -> web.Response:
        if how == "redirect":
            return web.Response(status=302, headers={"Location": target})
        return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{target}"'})

    server = f"{PUBLIC}:{await listening(PUBLIC, outside)}"
    async with ModelStore(StoreFolder(Path(root))) as store:
        try:
            async for _ in store.pull(f"{server}/library/m:1", insecure=True):
                pass
        except RegistryFailed as error:
            sys.stdout.write(f"{error}\n")
    sys.stdout.write(f"asked inside: {asked}\n")


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{PUBLIC}/32", "dev", "lo"], check=True)
    asyncio.run(main(*sys.argv[1:]))
