"""What a command line plans for: the machine, real or imagined, the llama.cpp found here, what the operator allows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from planner import budget
from planner.errors import InvalidRequest
from planner.policy import from_settings
from planner.types.machine import LlamaBuild, Machine
from planner.types.request import Policy
from planner.units import parse_size

if TYPE_CHECKING:
    from config.light import PlacementSettings
    from gpu.detect import Detected
    from planner.flags import CommandLine


class Surroundings(NamedTuple):
    """Where a command line plans. ``warnings`` are lines on settings that were odd."""

    machine: Machine
    build: LlamaBuild
    policy: Policy
    warnings: tuple[str, ...] = ()


def settings() -> tuple[PlacementSettings, tuple[str, ...]]:
    """Return the settings that placement needs and a line for each odd one. Raises InvalidRequest with all bad ones."""
    from config.light import read
    from config.resolve import ConfigError

    try:
        loaded = read(os.environ)
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None
    return loaded.settings, loaded.warnings


def surroundings(line: CommandLine) -> Surroundings:
    """Return where this command line plans. Raises InvalidRequest for a bad setting, device or size."""
    placing, odd = settings()
    options, request = line.options, line.request
    host_bytes = _host_memory(options.host_memory)
    if options.machine or options.what_if or options.cards or options.no_gpu:
        machine, build = _imagined(line, placing, host_bytes)
    else:
        found = detected(placing, request.rpc or (), named=request.devices or ())
        machine, build = found.machine, found.llama.build
    if host_bytes is not None:
        from gpu.whatif import with_host_memory

        machine = with_host_memory(machine, host_bytes)
    policy = from_settings(placing)
    return Surroundings(budget.with_overheads(machine, policy), build, policy, odd)


def _imagined(line: CommandLine, placing: PlacementSettings, host_bytes: int | None) -> tuple[Machine, LlamaBuild]:
    """Return the machine that the flags describe, and the llama-server that was found here."""
    from gpu import llama, machine_file, whatif

    options = line.options
    if line.request.rpc:
        raise InvalidRequest("--rpc with an imagined machine: write the address as --device RPC0@HOST:PORT=SIZE")
    try:
        if options.machine:
            machine = machine_file.read(options.machine)
        else:
            machine = whatif.machine(
                options.what_if, options.cards, host_memory_bytes=host_bytes, more_cards=placing.cards
            )
    except whatif.WhatIfError as error:
        raise InvalidRequest(str(error)) from None
    return machine, llama.find(os.environ, configured=placing.llama_server, n_gpus=0).build


def detected(placing: PlacementSettings, endpoints: Sequence[str] = (), *, named: Sequence[str] = ()) -> Detected:
    """Return this machine's devices, with the workers at ``endpoints``. Raises InvalidRequest for an address."""
    from config.values import RpcServer
    from gpu.detect import detect

    pinned = []
    for endpoint in endpoints:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"--rpc {endpoint}: expected HOST:PORT")
        pinned.append(RpcServer(host, int(port)))
    servers = (*placing.rpc_servers, *pinned)
    return detect(os.environ, llama_server=placing.llama_server, rpc_servers=servers, named=named)


def _host_memory(text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"--host-memory: {error}") from None
