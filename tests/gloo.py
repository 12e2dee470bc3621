"""Pools of gloo ranks on the CPU, started once per world size and reused: ``run(2, function, *args)``.

``function`` must be importable (module level), runs on every rank inside the process group, and what it returns comes
back as a list by rank. A failure on any rank ends the pool, because the others may hang in a collective.
"""

import atexit
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240


class Pool:
    """W processes with one gloo process group."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["timm", "pipeline.distributed"])  # imports cost seconds: once, not per rank
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, str(Path(self._folder.name) / "store"), there), daemon=True
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            ok, value = pipe.recv()
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


_POOLS: dict[int, Pool] = {}


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on every rank of a pool of ``world_size``; the results by rank."""
    if world_size not in _POOLS:
        _POOLS[world_size] = Pool(world_size)
    try:
        return _POOLS[world_size].run(function, *args)
    except (RuntimeError, TimeoutError):
        _POOLS.pop(world_size).close()
        raise


@atexit.register
def _close_all() -> None:
    while _POOLS:
        _POOLS.popitem()[1].close()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:  # noqa: BLE001 - reported, and raised by the parent
            pipe.send((False, traceback.format_exc()))
