"""What negatives cost: the queue service beside a real training step and beside memcpy, the memory bank on its shards,
both with more clients and more shards.

    python -m tests.benchmarks.negatives [--quick]

K = 65,536 keys of 128 float32 numbers, batches of 256. Progress goes to stderr; the last line of stdout is one JSON
object:

* ``service_share_of_step``: what a MoCo v2 step of a ResNet-18 at 224 px (B = 256, 2 ranks, in micro-batches of 16,
  with its update) costs more with the service than with the in-process queue, as a share: CPU time of the ranks and
  the shard, and the time that a loss waited for keys. The median over pairs of steps that follow one another, in turn
  first; with --quick steps of 8 images and a whole batch's keys. ``service_wall_share_of_step``: the same in wall time,
  in which a neighbour on the machine weighs more than the service; each with ``_spread``, half the distance between the
  quartiles of the pairs. Ranks, service and all else share this machine's cores.
* ``pull_vs_memcpy``: throughput of a pull of the whole queue, 32 MiB, as a share of memcpy's; no step does that.
* ``pull_vs_actor_call``: the same as a share of a plain actor call's that returns 32 MiB, Ray's own limit.
* ``exchange_ms_1_shards_4_clients`` and so on: a step of 256 keys through the service, until all clients have it.
* ``bank_memory_ratio``: what the processes of 2 shards grow by (private memory) while they take a bank and 20 steps,
  over N x D x bytes: of 1.28 million x 128 in float32 and 10 million x 128 in bfloat16, the larger of the two.
  ``bank_fill_s_*``: from empty shards until they are open. ``bank_read_ms_*``: one rank fetches 256 own slots and
  4,096 drawn ones; ``bank_step_ms_*``: and moves 256, with nothing to overlap it with; ``bank_hardest_ms_*``: the 64
  slots most similar to each of 32 queries; ``local_bank_step_ms``: in-process, of 1.28 million.
* ``bank_step_ms_2_shards_4_clients`` and so on: all clients fetch 4,096 drawn slots and their share of 256, and move
  those.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from pipeline.accumulation import backward_in_parts
from pipeline.checkpoint import CheckpointStore
from pipeline.cluster.shards import RayShards, serving, status
from pipeline.data.batch import Batch
from pipeline.methods.base import Method, method_class
from pipeline.models.backbone import BackboneConfig, random_backbone
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.bank_shard import BankSpec, Part, Read, Write
from pipeline.negatives.config import NegativesConfig
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.queue_shard import QueueSpec, Rows
from pipeline.negatives.served_bank import ServedBank
from pipeline.negatives.served_queue import ServedQueue
from pipeline.optim import OptimConfig, build_optimizer, ema_update_, set_lr
from tests import gloo

SIZE, DIM, BATCH, WORLD = 65536, 128, 256, 2
RUN = "benchmark"
MICRO = 16  # images at a time in the ResNet-18 step: 128 at once take 5 GiB a rank
NOISE = 4096
NOTHING_SAVED = CheckpointStore("/nonexistent/checkpoints", "run")


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """The median wall time."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def served(num_shards: int) -> Iterator[None]:
    """Shards of this benchmark's run."""
    with serving(NegativesConfig(backend="service", num_shards=num_shards), RUN):
        yield


def handles(num_shards: int) -> RayShards:
    """This process's way to them."""
    return RayShards([ray.get_actor(f"shard-{i}", namespace=f"parallax-queue-{RUN}") for i in range(num_shards)])


# --- beside a training step ------------------------------------------------------------------------------------------


@functools.cache
def resnet18(address: str) -> tuple[Method, dict[str, MomentumQueue], torch.optim.Optimizer]:
    """On a rank: MoCo v2, the two places of its queue, and an optimizer; kept from pair to pair."""
    ray.init(address=address, log_to_driver=False, logging_level="error")
    cls = method_class("moco_v2")
    config = cls.Config.model_validate({"name": "moco_v2", "queue_size": SIZE})
    method = cls(random_backbone(BackboneConfig(name="resnet18", image_size=224), seed=0), config)
    queues = {"local": MomentumQueue(SIZE, DIM)}
    queues["served"] = ServedQueue(MomentumQueue(SIZE, DIM), handles(1), batch=BATCH, max_staleness=0)
    return method, queues, build_optimizer(method, OptimConfig(name="sgd", lr=0.03), 0.03)


def resnet18_step(address: str, backend: str, images: int) -> tuple[float, float]:
    """On a rank: wall seconds of a step with ``images`` of its 128 images, and with keys for all of them; and its CPU
    seconds with those for which it waited for keys."""
    method, queues, optimizer = resnet18(address)
    views = [torch.randn(images, 3, 224, 224) for _ in range(2)]
    method.queue = Repeated(queues[backend], BATCH // WORLD // images)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    set_lr(optimizer, 0.03)
    optimizer.zero_grad()
    batch, parts = Batch(views, torch.arange(images)), images // min(MICRO, images)
    backward_in_parts(method, batch, parts, torch.autocast("cpu", enabled=False))
    optimizer.step()
    ema_update_(method.momentum_pairs(), 0.999)
    waited = queues[backend].gauges().get("queue/waited_ms", 0.0) / 1e3
    return time.perf_counter() - wall, time.process_time() - cpu + waited


class Repeated(torch.nn.Module):
    """A queue that takes every key ``times`` times: the exchange of a whole batch beside a part of its images."""

    def __init__(self, queue: MomentumQueue, times: int) -> None:
        super().__init__()
        self.queue, self.times = queue, times

    def negatives(self) -> torch.Tensor:
        return self.queue.negatives()

    def enqueue(self, keys: torch.Tensor, sample_ids: torch.Tensor) -> None:
        self.queue.enqueue(keys.repeat(self.times, 1), sample_ids.repeat(self.times))


def leave(address: str) -> None:
    """On a rank: end what ``resnet18`` began."""
    _, queues, _ = resnet18(address)
    queues["served"].close()
    resnet18.cache_clear()
    ray.shutdown()


def bench_step(address: str, quick: bool) -> dict[str, float]:
    """The service's share of a step."""
    images, pairs = (8, 3) if quick else (BATCH // WORLD, 5)
    taken: dict[str, dict[str, list[float]]] = {kind: {"local": [], "served": []} for kind in ("wall", "cost")}
    with served(1):
        gloo.run(WORLD, resnet18_step, address, "local", 8)
        gloo.run(WORLD, resnet18_step, address, "served", 8)
        (shard,) = status()[RUN]
        for pair in range(pairs):
            for backend in ("local", "served") if pair % 2 else ("served", "local"):
                before = cpu_seconds(shard["pid"])
                ranks = gloo.run(WORLD, resnet18_step, address, backend, images)
                taken["wall"][backend].append(max(wall for wall, _ in ranks))
                taken["cost"][backend].append(sum(cost for _, cost in ranks) + cpu_seconds(shard["pid"]) - before)
                print(f"pair {pair + 1} of {pairs}: {backend} {taken['wall'][backend][-1]:.2f} s", file=sys.stderr)
        gloo.run(WORLD, leave, address)
    of_batch = images / (BATCH // WORLD)  # the exchange is a whole batch's
    figures = {"resnet18_step_s": statistics.median(taken["wall"]["local"]) / of_batch}
    for name, kind in (("service", "cost"), ("service_wall", "wall")):
        pairs_of = zip(taken[kind]["served"], taken[kind]["local"], strict=True)
        low, middle, high = statistics.quantiles([of_batch * (ours / theirs - 1) for ours, theirs in pairs_of], n=4)
        figures |= {f"{name}_share_of_step": middle, f"{name}_share_spread": (high - low) / 2}
    return figures


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- beside memcpy, and with more clients and shards -----------------------------------------------------------------


def random_rows(start: int, stop: int) -> Rows:
    keys = np.random.default_rng(0).integers(0, 255, (stop - start, DIM * 4), np.uint8)
    return Rows(start, stop, keys, np.arange(start, stop))


def opened_queue(num_shards: int) -> tuple[RayShards, list[int]]:
    """Shards that hold a full queue, and their lives."""
    shards, whole = handles(num_shards), random_rows(-SIZE, 0)
    spec = QueueSpec(SIZE, DIM, "float32", BATCH, num_shards, steps_in_flight=3)
    shards.fill(1, spec, [whole.share(i, num_shards) for i in range(num_shards)])
    return shards, shards.open(1, spec)


def bench_pull(repetitions: int) -> dict[str, float]:
    """The whole queue through one shard, and a copy of it."""
    source, target = np.ones((SIZE, DIM), np.float32), np.empty((SIZE, DIM), np.float32)
    with served(1):
        shards, lives = opened_queue(1)

        def pull() -> None:
            (reply,) = shards.exchange(1, lives, [[]], [-SIZE], caller={"rank": 0}, at_least=0, wait_s=5)
            assert reply.answer.keys.nbytes == target.nbytes

        pull()
        pull_s = seconds(pull, repetitions)
    plain = Plain.remote()
    ray.get(plain.whole.remote())
    call_s = seconds(lambda: ray.get(plain.whole.remote()), repetitions)
    copy_s = seconds(lambda: np.copyto(target, source), repetitions)
    return {"pull_vs_memcpy": copy_s / pull_s, "pull_vs_actor_call": call_s / pull_s}


@ray.remote(num_cpus=0)
class Plain:
    """What Ray itself takes for a call that returns as much."""

    def __init__(self) -> None:
        self._whole = np.ones((SIZE, DIM), np.float32)

    def whole(self) -> np.ndarray:
        return self._whole


@ray.remote(num_cpus=0)
class Client:
    """One rank's exchanges, without a model."""

    def __init__(self, rank: int, clients: int, num_shards: int) -> None:
        self._rank, self._count, self._num_shards = rank, BATCH // clients, num_shards

    def ready(self) -> None:
        """Answered when the process runs: 16 take a minute to start, and none should wait for another in a step."""

    def keys(self, lives: list[int], start: int, steps: int) -> float:
        """Seconds per step, each pushed, completed by the other clients, and pulled."""
        began = time.perf_counter()
        for first in range(start, start + steps * BATCH, BATCH):
            own = first + self._rank * self._count
            requests = [first] * self._num_shards
            self._exchange(lives, [random_rows(own, own + self._count)], requests, at_least=first + BATCH)
        return (time.perf_counter() - began) / steps

    def slots(self, lives: list[int], start: int, steps: int) -> float:
        """Seconds per step: own and drawn slots fetched, own ones written."""
        began = time.perf_counter()
        for step in range(start, start + steps):
            ids = np.random.default_rng(step).permutation(SIZE)[: BATCH + NOISE]
            own = ids[self._rank * self._count :][: self._count]
            wanted = np.concatenate([own, ids[BATCH:]])
            requests = [Read(step, wanted[wanted % self._num_shards == index]) for index in range(self._num_shards)]
            replies = self._exchange(lives, [], requests, at_least=step)
            assert sum(len(reply.answer.value) for reply in replies) == self._count + NOISE
            moved = np.zeros((self._count, DIM * 4), np.uint8)
            self._exchange(lives, [Write(step, self._rank, own, moved, 0)], [None] * self._num_shards, at_least=0)
        return (time.perf_counter() - began) / steps

    def _exchange(self, lives: list[int], pushes: list[Any], requests: list[Any], at_least: int) -> Any:
        return handles(self._num_shards).exchange(
            1,
            lives,
            [[rows.share(index, self._num_shards) for rows in pushes] for index in range(self._num_shards)],
            requests,
            caller={"rank": self._rank},
            at_least=at_least,
            wait_s=60,
        )


def bench_growth(num_shards: int, num_clients: int, steps: int) -> dict[str, float]:
    """A step of 256 keys, and one of a bank of 65,536 slots, with so many clients and shards."""
    clients = [Client.remote(rank, num_clients, num_shards) for rank in range(num_clients)]
    ray.get([client.ready.remote() for client in clients])
    with served(num_shards):
        _, lives = opened_queue(num_shards)
        ray.get([client.keys.remote(lives, 0, 3) for client in clients])
        exchange = max(ray.get([client.keys.remote(lives, 3 * BATCH, steps) for client in clients]))
    with served(num_shards):
        shards = handles(num_shards)
        spec = BankSpec(SIZE, DIM, "float32", 0, num_clients, num_shards)
        shards.fill(1, spec, [Part(0, 0, len(spec.own_ids(i)), None) for i in range(num_shards)])
        lives = shards.open(1, spec)
        ray.get([client.slots.remote(lives, 0, 3) for client in clients])
        step = max(ray.get([client.slots.remote(lives, 3, steps) for client in clients]))
    for client in clients:
        ray.kill(client)
    name = f"{num_shards}_shards_{num_clients}_clients"
    return {f"exchange_ms_{name}": 1e3 * exchange, f"bank_step_ms_{name}": 1e3 * step}


# --- the memory bank -------------------------------------------------------------------------------------------------


def bank_read(bank: MemoryBank | ServedBank, count: int) -> None:
    bank.expect(torch.arange(count) * 997, NOISE)
    bank.read()


def bank_step(bank: MemoryBank | ServedBank) -> None:
    bank_read(bank, BATCH)
    bank.update(torch.randn(BATCH, DIM), 0.5)


def bench_local_bank(repetitions: int) -> dict[str, float]:
    """A replica of ImageNet's."""
    bank = MemoryBank(1_281_167, DIM)
    bank_step(bank)
    return {"local_bank_step_ms": 1e3 * seconds(lambda: bank_step(bank), repetitions)}


def private_bytes(pid: int) -> int:
    """Of a process: what it does not share with Ray's object store."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def bench_bank(name: str, num_samples: int, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """A bank on 2 shards, this process its only rank."""
    bank = MemoryBank(num_samples, DIM, dtype)
    with served(2):
        shards = status()[RUN]
        before = sum(private_bytes(shard["pid"]) for shard in shards)
        began = time.perf_counter()
        slots = ServedBank(bank, handles(2), checkpoints=NOTHING_SAVED, name="bank")
        filled = time.perf_counter() - began
        step = seconds(lambda: bank_step(slots), repetitions)
        read = seconds(lambda: bank_read(slots, BATCH), repetitions)
        bank_read(slots, 32)
        hardest = seconds(lambda: slots.hardest(torch.randn(32, DIM), 64), 3)
        grown = sum(private_bytes(shard["pid"]) for shard in shards) - before
        slots.close()
    assert bank.slots.numel() == 0
    return {
        f"bank_memory_ratio_{name}": grown / (num_samples * DIM * dtype.itemsize),
        f"bank_fill_s_{name}": filled,
        f"bank_read_ms_{name}": 1e3 * read,
        f"bank_step_ms_{name}": 1e3 * step,
        f"bank_hardest_ms_{name}": 1e3 * hardest,
    }


def main() -> None:
    """Run everything and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute; fewer repetitions, clients and shards")
    quick = parser.parse_args().quick
    context = ray.init(
        address="local", num_cpus=WORLD, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    figures: dict[str, float] = {}

    def add(more: dict[str, float]) -> None:
        figures.update({name: round(value, 5) for name, value in more.items()})
        print(more, file=sys.stderr)

    add(bench_step(context.address_info["address"], quick))
    add(bench_pull(5 if quick else 25))
    add(bench_local_bank(20))
    add(bench_bank("1.28m", 1_281_167, torch.float32, 20))
    if not quick:
        add(bench_bank("10m", 10_000_000, torch.bfloat16, 20))
    figures["bank_memory_ratio"] = max(value for name, value in figures.items() if "memory_ratio" in name)
    for num_shards, num_clients in [(1, 1)] if quick else [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (4, 4)]:
        add(bench_growth(num_shards, num_clients, 20 if quick else 100))
    ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
