"""Run functions on several gloo ranks of this machine.

The ranks of a world size are started once per session and reused: importing DeepSpeed is slow.
"""

from __future__ import annotations

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    groups: list[dist.ProcessGroup] = []
    new_group = dist.new_group

    def recorded(*args: Any, **options: Any) -> dist.ProcessGroup:
        group = new_group(*args, **options)
        if "backend" in options:  # DeepSpeed keeps those that it makes, which name none
            groups.append(group)
        return group

    dist.new_group = recorded
    while True:
        body, args = pipe.recv()
        # Each gloo group has threads that poll. Every rank has left the groups of the last run.
        while groups:
            dist.destroy_process_group(groups.pop())
        try:
            body(rank, world, *args)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())


class _World:
    def __init__(self, size: int) -> None:
        context, port = mp.get_context("spawn"), _free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, body: Callable[..., None], args: tuple[Any, ...]) -> list[str]:
        for pipe in self.pipes:
            pipe.send((body, args))
        failures = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                failures.append(f"rank {rank} did not answer within {TIMEOUT_S} s")
            elif (failure := pipe.recv()) is not None:
                failures.append(f"rank {rank}: {failure}")
        return failures

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_worlds: dict[int, _World] = {}


def on_ranks(world: int, body: Callable[..., None], *args: Any) -> None:
    """Run body(rank, world, *args) on `world` ranks; re-raises an exception of any rank."""
    if world not in _worlds:
        _worlds[world] = _World(world)
        atexit.register(_worlds[world].end)
    failures = _worlds[world].run(body, args)
    if failures:
        # The other ranks may hang in a collective, so this group cannot be reused.
        _worlds.pop(world).end()
        raise AssertionError("\n".join(failures))
