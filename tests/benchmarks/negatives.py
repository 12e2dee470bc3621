"""What negatives cost: the queue service beside a training step and beside memcpy, with more clients and more shards;
the memory bank's updates, draws and memory.

    python -m tests.benchmarks.negatives [--quick]

K = 65,536 keys of 128 float32 numbers, batches of 256. Progress goes to stderr; the last line of stdout is one JSON
object:

* ``service_share_of_step``: what a step of 2 busy ranks takes longer with the service than with the in-process queue,
  over a MoCo v2 step of a ResNet-18 at 224 px (measured at 8 images a rank, times 16). Ranks, service and all else
  share this machine's cores, so whatever the service computes counts.
* ``pull_vs_memcpy``: throughput of a pull of the whole queue, 32 MiB, as a share of memcpy's.
* ``pull_vs_actor_call``: the same as a share of a plain actor call's that returns 32 MiB, Ray's own limit.
* ``exchange_ms_1_shards_4_clients`` and so on: a step of 256 keys through the service, until all clients have it.
* ``bank_memory_ratio``: what a process with a bank of 10 million x 128 in bf16 grows by, over N x D x 2 bytes;
  ``bank_*_ms``: drawing and reading 4,096 slots, and moving 256, with 1.28 million in float32 and those 10 million.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.cluster.shards import RayShards, serving
from pipeline.data.batch import Batch
from pipeline.methods.base import method_class
from pipeline.models.backbone import BackboneConfig, random_backbone
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.config import NegativesConfig
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.service import ServedQueue
from pipeline.negatives.shard import QueueSpec, Rows, own_numbers
from tests import gloo

SIZE, DIM, BATCH, WORLD = 65536, 128, 256, 2
RUN = "benchmark"
IMAGES = 8  # per rank in the measured ResNet-18 step


def seconds(work: Callable[[], object], repetitions: int) -> float:
    """The median wall time."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def served_queue(num_shards: int) -> Iterator[None]:
    """Shards of this benchmark's run."""
    with serving(NegativesConfig(backend="service", num_shards=num_shards), RUN):
        yield


def handles(num_shards: int) -> RayShards:
    """This process's way to them."""
    return RayShards([ray.get_actor(f"shard-{i}", namespace=f"parallax-queue-{RUN}") for i in range(num_shards)])


# --- beside a training step ------------------------------------------------------------------------------------------


def rank_steps(address: str, blocks: int, steps: int) -> tuple[float, float]:
    """On a rank: seconds a step takes with the local queue and with the served one, in turn."""
    ray.init(address=address, log_to_driver=False, logging_level="error")
    torch.manual_seed(0)
    local = MomentumQueue(SIZE, DIM)
    served = ServedQueue(MomentumQueue(SIZE, DIM), handles(1), batch=BATCH, max_staleness=0)
    keys, ids = torch.randn(BATCH // WORLD, DIM), torch.arange(BATCH // WORLD)
    x = torch.randn(512, 512)

    def step(queue: MomentumQueue) -> None:
        queue.negatives()
        for _ in range(10):
            x @ x
        queue.enqueue(keys, ids)
        for _ in range(20):  # forward is a third of a step
            x @ x
        distributed.all_reduce_sum(x[0])  # ranks go in step, as gradients make them

    times: dict[MomentumQueue, list[float]] = {local: [], served: []}
    for _ in range(blocks):
        for queue, taken in times.items():
            dist.barrier()
            taken.append(seconds(lambda queue=queue: [step(queue) for _ in range(steps)], 1) / steps)
    served.close()
    ray.shutdown()
    return statistics.median(times[local]), statistics.median(times[served])


def resnet18_step(repetitions: int) -> float:
    """On a rank: seconds of a MoCo v2 step of a ResNet-18 at 224 px with 8 images, without its update."""
    backbone = random_backbone(BackboneConfig(name="resnet18", image_size=224), seed=0)
    cls = method_class("moco_v2")
    method = cls(backbone, cls.Config.model_validate({"name": "moco_v2", "queue_size": SIZE}))
    views = [torch.randn(IMAGES, 3, 224, 224) for _ in range(2)]
    batch = Batch(views, torch.arange(IMAGES))

    def step() -> None:
        loss, _ = method(batch)
        loss.backward()

    step()
    dist.barrier()
    return seconds(step, repetitions)


def bench_step(address: str, quick: bool) -> dict[str, float]:
    """The service's share of a step."""
    with served_queue(1):
        ranks = gloo.run(WORLD, rank_steps, address, 4 if quick else 8, 40)
    added = statistics.mean(served - local for local, served in ranks)
    step_s = statistics.mean(gloo.run(WORLD, resnet18_step, 2 if quick else 5)) * BATCH / WORLD / IMAGES
    return {
        "service_share_of_step": added / step_s,
        "service_added_ms": 1e3 * added,
        "local_step_ms": 1e3 * statistics.mean(local for local, _ in ranks),
        "resnet18_step_s": step_s,
    }


# --- beside memcpy, and with more clients and shards -----------------------------------------------------------------


def spec(num_shards: int) -> QueueSpec:
    return QueueSpec(SIZE, DIM, "float32", BATCH, num_shards, steps_in_flight=3)


def share(rows: Rows, index: int, num_shards: int) -> Rows:
    mine = own_numbers(rows.start, rows.stop, index, num_shards)
    return Rows(rows.start, rows.stop, rows.keys[mine], rows.sample_ids[mine])


def random_rows(start: int, stop: int) -> Rows:
    keys = np.random.default_rng(0).integers(0, 255, (stop - start, DIM * 4), np.uint8)
    return Rows(start, stop, keys, np.arange(start, stop))


def opened(num_shards: int) -> tuple[RayShards, list[int]]:
    """Shards that hold a full queue."""
    shards, whole = handles(num_shards), random_rows(-SIZE, 0)
    return shards, shards.open(1, spec(num_shards), [share(whole, i, num_shards) for i in range(num_shards)])


def bench_pull(repetitions: int) -> dict[str, float]:
    """The whole queue through one shard, and a copy of it."""
    source, target = np.ones((SIZE, DIM), np.float32), np.empty((SIZE, DIM), np.float32)
    with served_queue(1):
        shards, lives = opened(1)

        def pull() -> None:
            (reply,) = shards.exchange(1, lives, [[]], caller={"rank": 0}, start=-SIZE, at_least=0, wait_s=5)
            assert reply.rows.keys.nbytes == target.nbytes

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
        self._rank, self._count, self._shards = rank, BATCH // clients, handles(num_shards)
        self._num_shards = num_shards

    def exchanges(self, lives: list[int], start: int, steps: int) -> float:
        """Seconds per step, each pushed, completed by the other clients, and pulled."""
        began = time.perf_counter()
        for first in range(start, start + steps * BATCH, BATCH):
            own = first + self._rank * self._count
            rows = random_rows(own, own + self._count)
            self._shards.exchange(
                1,
                lives,
                [[share(rows, i, self._num_shards)] for i in range(self._num_shards)],
                caller={"rank": self._rank},
                start=first,
                at_least=first + BATCH,
                wait_s=60,
            )
        return (time.perf_counter() - began) / steps


def bench_growth(num_shards: int, num_clients: int, steps: int) -> dict[str, float]:
    """A step of 256 keys with so many clients and shards."""
    with served_queue(num_shards):
        _, lives = opened(num_shards)
        clients = [Client.remote(rank, num_clients, num_shards) for rank in range(num_clients)]
        ray.get([client.exchanges.remote(lives, 0, 3) for client in clients])
        times = ray.get([client.exchanges.remote(lives, 3 * BATCH, steps) for client in clients])
        for client in clients:
            ray.kill(client)
    return {f"exchange_ms_{num_shards}_shards_{num_clients}_clients": 1e3 * max(times)}


# --- the memory bank -------------------------------------------------------------------------------------------------


def bank_costs(num_samples: int, dtype: str, repetitions: int) -> dict[str, float]:
    """In a process of its own: resident bytes over N x D x bytes, and the milliseconds of a step's two halves."""
    torch.set_num_threads(1)
    before = resident_bytes()
    bank = MemoryBank(num_samples, DIM, getattr(torch, dtype))
    grown = resident_bytes() - before
    ids, embeddings = torch.randint(num_samples, (BATCH,)), torch.randn(BATCH, DIM)
    return {
        "memory_ratio": grown / (num_samples * DIM * bank.slots.element_size()),
        "draw_ms": 1e3 * seconds(lambda: bank.read(bank.draw(4096)), repetitions),
        "update_ms": 1e3 * seconds(lambda: bank.update(ids, embeddings, 0.5), repetitions),
    }


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_bank(quick: bool) -> dict[str, float]:
    """ImageNet's size, and 10 million."""
    figures = {}
    sizes = {"1.28m": (1_281_167, "float32")} | ({} if quick else {"10m": (10_000_000, "bfloat16")})
    for name, (num_samples, dtype) in sizes.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            costs = pool.submit(bank_costs, num_samples, dtype, 20).result()
        figures |= {f"bank_{key}_{name}": value for key, value in costs.items()}
    return figures | {"bank_memory_ratio": max(v for k, v in figures.items() if "memory_ratio" in k)}


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
    for num_shards, num_clients in (
        [(1, 1), (1, 4)] if quick else [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (4, 4)]
    ):
        add(bench_growth(num_shards, num_clients, 20 if quick else 100))
    ray.shutdown()
    add(bench_bank(quick))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
