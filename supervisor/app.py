"""The composition root: settings in, a running service out, everything undone in the right order."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from config import render
from config.resolve import ConfigError
from config.settings import Loaded, Settings, load
from supervisor.children import tending
from supervisor.core.types import Limits
from supervisor.daemon import listener, lock, log_setup, operator_files
from supervisor.daemon.notify import Notifier
from supervisor.daemon.operator_files import OperatorFiles
from supervisor.gateway.access import Clients
from supervisor.gateway.app import CLIENTS, build_app, make_runner
from supervisor.gateway.options import GatewayOptions
from supervisor.inventory import Inventory
from supervisor.learned import Learned
from supervisor.planning.process import PlanningProcess
from supervisor.runtime import RuntimeOptions, Supervisor
from supervisor.store.folder import StoreFolder
from supervisor.store.logins import Logins
from supervisor.store.store import ModelStore

# Where the operator says nothing, one client may have this part of MAX_QUEUE: most batches that ask for everything at
# once are not held up, and whoever comes next finds room.
CLIENT_SHARE: Final = 0.5
# Objects that may come into being between two collections. Nearly all go by themselves; Python's own 700 are reached
# within every request. They come to a megabyte.
COLLECT_AFTER: Final = 10_000
EXIT_OK: Final = 0
EXIT_CANNOT_RUN: Final = 1
EXIT_BAD_SETTINGS: Final = 2
# Streams had DRAIN_TIMEOUT before; this is for the error event that ends those which did not finish.
LAST_BYTES_S: Final = 2.0

_log: structlog.typing.FilteringBoundLogger = structlog.get_logger("supervisor.app")


def serve(environ: Mapping[str, str]) -> int:
    """Serve until told to stop, and return the exit status: 0 stopped, 1 cannot run, 2 bad settings.

    Whatever keeps it from running is said in one line on stderr, each bad setting in one of its own. A missing
    llama-server or models folder does not: the service starts, says so on ``/readyz``, and finds it once it is there.
    """
    try:
        loaded = load(environ)
        files = operator_files.read(loaded.settings)
    except ConfigError as error:
        return _complain(str(error), EXIT_BAD_SETTINGS)
    settings = loaded.settings
    log_setup.configure(settings.log_format, debug=settings.debug > 0)
    try:
        with (
            lock.held(settings.state_dir),
            listener.bound(settings.host.host, settings.host.port) as bound,
        ):
            tending.prepare(settings.state_dir)
            anyio.run(_serve, loaded, files, environ, bound)
    except (lock.AlreadyRunning, listener.CannotListen) as error:
        return _complain(str(error), EXIT_CANNOT_RUN)
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}; check PLANNER_STATE_DIR", EXIT_CANNOT_RUN)
    return EXIT_OK


async def _serve(loaded: Loaded, files: OperatorFiles, environ: Mapping[str, str], bound: socket.socket) -> None:
    """Start from the inside out; stop new work first, then streams, then children, then the listener."""
    settings = loaded.settings
    notifier = Notifier(environ)
    _log.info("config.effective", **render.log_values(loaded.values))
    for warning in loaded.warnings:
        _log.warning("config.odd", warning=warning)
    folder = StoreFolder(settings.store, settings.registry)
    planning = PlanningProcess(environ)
    make_inventory = partial(
        Inventory,
        settings.models,
        planning,
        store=folder,
        folder_optional=loaded.is_default("models"),
        learned=Learned(settings.state_dir),
    )
    supervisor = Supervisor(_runtime_options(loaded, environ), make_inventory)
    inventory = supervisor.inventory
    store = ModelStore(folder, logins=Logins(settings.registry_logins), files_of=inventory.files_of)
    async with planning, store, anyio.create_task_group() as tasks:
        await tasks.start(supervisor.run)
        await tasks.start(_obey_signals, supervisor, notifier)
        app = build_app(supervisor, _gateway_options(settings, files), store)
        supervisor.configure(files.models)
        await tasks.start(_reload_on_signal, settings, files, app[CLIENTS], supervisor, notifier)
        runner = make_runner(app, shutdown_timeout_s=LAST_BYTES_S)
        try:
            await runner.setup()
            await runner.listen(bound, files.tls)
            _log.info("serve.listening", url=_url(bound, secure=files.tls is not None))
            tasks.start_soon(_look_around, inventory, notifier)
            tasks.start_soon(notifier.feed_watchdog)
            await supervisor.wait_stopped()
        finally:
            with anyio.CancelScope(shield=True):
                await runner.cleanup()
        tasks.cancel_scope.cancel()
    _log.info("serve.stopped")


async def _look_around(inventory: Inventory, notifier: Notifier) -> None:
    """Find out what there is, then tell systemd; what is missing is told on ``/readyz`` and looked for again."""
    await inventory.look_around()
    gc.collect()
    gc.freeze()  # what is there now stays: a collection in the middle of a stream need not look through all of it
    gc.set_threshold(COLLECT_AFTER)
    problems = inventory.not_ready
    _log.info("serve.ready", models=len(inventory.entries), not_ready=list(problems))
    notifier.ready("; ".join(problems) or f"{len(inventory.entries)} models, none loaded yet")
    await inventory.keep_looking()


async def _obey_signals(
    supervisor: Supervisor, notifier: Notifier, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
) -> None:
    """Stop on SIGTERM and SIGINT; a second one hurries."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            _log.info("serve.stopping", signal=signal.Signals(number).name)
            notifier.stopping()
            supervisor.shut_down()


async def _reload_on_signal(
    settings: Settings,
    files: OperatorFiles,
    clients: Clients,
    supervisor: Supervisor,
    notifier: Notifier,
    *,
    task_status: TaskStatus[None] = TASK_STATUS_IGNORED,
) -> None:
    """Read the operator's files again on SIGHUP. Where anything in them is wrong, everything stays as it was."""
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            notifier.reloading()
            try:
                new = operator_files.read(settings)
            except ConfigError as error:
                _log.error("config.not_reloaded", problems=[str(problem) for problem in error.problems])
                told = f"not reloaded: {error.problems[0]}"  # the log has the others
            else:
                clients.replace(new.clients)
                if files.tls is not None and settings.tls_cert is not None:
                    files.tls.load_cert_chain(settings.tls_cert, settings.tls_key)  # new connections get the new one
                supervisor.configure(new.models)
                _log.info("config.reloaded", clients=len(new.clients), models=list(new.models.models))
                told = f"reloaded, {len(new.models.models)} models have settings of their own"
            notifier.ready(told)


def _runtime_options(loaded: Loaded, environ: Mapping[str, str]) -> RuntimeOptions:
    settings = loaded.settings
    max_queue = max(1, settings.max_queue)  # the request that causes a load waits for it
    limits = Limits(
        max_loaded_models=settings.max_loaded_models or None,
        max_queue=max_queue,
        client_queue=settings.client_queue or max(1, int(max_queue * CLIENT_SHARE)),
        queue_timeout_s=settings.queue_timeout,
        keep_alive_s=settings.keep_alive,
        load_timeout_s=settings.load_timeout,
        drain_timeout_s=settings.drain_timeout,
    )
    return RuntimeOptions(
        version=_version(),
        limits=limits,
        state_dir=settings.state_dir,
        stop_grace_s=settings.stop_grace,
        n_ctx_per_slot=settings.context_length,
        environ=environ,
        warnings=loaded.warnings,
    )


def _gateway_options(settings: Settings, files: OperatorFiles) -> GatewayOptions:
    return GatewayOptions(
        version=_version(),
        api_keys=settings.api_keys,
        clients=files.clients,
        keys_needed=not (settings.host.is_loopback or settings.allow_remote),
        origins=settings.origins,
        loopback_only=settings.host.is_loopback,
        max_body_bytes=settings.max_body,
    )


def _version() -> str:
    try:
        return version("loadmaster")
    except PackageNotFoundError:
        return "unknown"


def _url(bound: socket.socket, *, secure: bool) -> str:
    host, port = bound.getsockname()[:2]
    return f"{'https' if secure else 'http'}://" + (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _complain(text: str, status: int) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"planner: error: {line}\n")
    return status
