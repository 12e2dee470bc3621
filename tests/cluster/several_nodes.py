"""A queue and a bank whose shards lie on three Ray nodes, one of which dies while they are used.

    python -m tests.cluster.several_nodes

A process of its own, because ``ray.cluster_utils`` leaves its mark on one. Ends with 0 if nothing was lost.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor

from pipeline.checkpoint import CheckpointStore
from pipeline.cluster.shards import RayShards, serving, status
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.config import NegativesConfig
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.served_bank import ServedBank
from pipeline.negatives.served_queue import ServedQueue

BATCH, DIM, STEPS = 8, 4, 60


def run(queue: MomentumQueue, bank: MemoryBank | ServedBank, at_step: Callable[[int], None]) -> dict[str, Tensor]:
    """The states of both after ``STEPS`` steps of one rank."""
    for step in range(STEPS):
        at_step(step)
        generator = torch.Generator().manual_seed(step)
        new = torch.randn(BATCH, DIM, generator=generator)
        ids = torch.randperm(97, generator=generator)[:BATCH]
        bank.expect(ids, 6)
        bank.read()
        queue.negatives()
        queue.enqueue(new, ids)
        bank.update(new, 0.5)
    return {**queue.state_dict(prefix="queue."), **bank.state_dict(prefix="bank.")}


def local() -> tuple[MomentumQueue, MemoryBank]:
    """What both backends start from."""
    torch.manual_seed(0)
    return MomentumQueue(20, DIM), MemoryBank(97, DIM)


def main() -> None:
    """Run, kill a node that has a shard and is not this process's, compare."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    expected = run(*local(), lambda step: None)
    queue, bank = local()
    config = NegativesConfig(backend="service", num_shards=3)
    with serving(config, "queue") as of_queue, serving(config, "bank") as of_bank:
        served_queue = ServedQueue(queue, RayShards(of_queue), batch=BATCH, max_staleness=0)
        saved = CheckpointStore("/nonexistent/checkpoints", "run")
        served_bank = ServedBank(bank, RayShards(of_bank), checkpoints=saved, name="bank")

        def at_step(step: int) -> None:
            if step == STEPS // 2:
                shards = status()
                used = {run_id: {shard["node"] for shard in on} for run_id, on in shards.items()}
                assert all(len(on) == 3 for on in used.values()), used
                lost_at.append(time.monotonic())
                lost = [shard["pid"] for on in shards.values() for shard in on if shard["node"] == nodes[0].node_id]
                assert len(lost) == 2, shards
                cluster.remove_node(nodes[0], allow_graceful=False)
                # a dead machine takes them along; here they would go on for up to 1 s, which can be all the steps left
                for pid in lost:
                    with suppress(ProcessLookupError):  # ended by itself since
                        os.kill(pid, signal.SIGKILL)

        lost_at: list[float] = []
        actual = run(served_queue, served_bank, at_step)
        print(f"went on after {time.monotonic() - lost_at[0]:.1f} s", file=sys.stderr)
        left = {shard["node"] for shards in status().values() for shard in shards}
        assert nodes[0].node_id not in left, left
        served_queue.close()
        served_bank.close()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
