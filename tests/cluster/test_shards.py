"""Real shards in real processes: the local queue's trajectory, kills, a rank that never comes, two drivers."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.checkpoint import CheckpointStore, TrainState
from pipeline.cluster.inbox import Report, WorkerFailure
from pipeline.cluster.shards import QueueInUseError, RayShards, serving, status
from pipeline.cluster.trainer import pretrain
from pipeline.config import Config, load_config, override
from pipeline.data.manifest import Manifest
from pipeline.negatives import courier
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.config import NegativesConfig
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.served_bank import ServedBank
from pipeline.negatives.served_queue import ServedQueue
from pipeline.negatives.service import negatives_service
from pipeline.negatives.shard import ServiceError
from pipeline.preflight import prepare_data
from pipeline.progress import Progress
from pipeline.runs import Run
from pipeline.train import fit
from tests import gloo
from tests.methods.invariance import GLOBAL_BATCH, train

pytestmark = pytest.mark.integration
BATCH, SIZE, DIM = 8, 20, 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray of one node in this process, without a token: a pool of ranks may be older than it, and not know one."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield context.address_info["address"]
        ray.shutdown()


def shards_of(run_id: str, num_shards: int) -> RayShards:
    return RayShards([ray.get_actor(f"shard-{i}", namespace=f"parallax-queue-{run_id}") for i in range(num_shards)])


def service_config(num_shards: int, max_staleness: int = 0) -> NegativesConfig:
    return NegativesConfig(backend="service", num_shards=num_shards, max_staleness=max_staleness)


def as_rank(address: str, run_id: str, num_shards: int, work: Any) -> Any:
    """``work(shards)`` on a rank, which joins Ray for it."""
    ray.init(address=address, log_to_driver=False)
    try:
        return work(shards_of(run_id, num_shards))
    finally:
        ray.shutdown()


def train_served(name: str, settings: dict[str, Any], shards: RayShards) -> dict[str, dict[str, Tensor]]:
    nothing_saved = CheckpointStore("/nonexistent/checkpoints", "run")
    with negatives_service(shards, batch=GLOBAL_BATCH, max_staleness=0, checkpoints=nothing_saved) as serve:
        return train(name, torch.float32, 8, serve, **settings)


def train_local(name: str, settings: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return train(name, torch.float32, 8, **settings)


@pytest.mark.parametrize(
    ("name", "world", "settings"),
    [
        ("moco_v1", 1, {}),
        ("moco_v2", 2, {}),
        ("npid", 1, {"hard_negatives": 5}),
        ("npid", 2, {"hard_negatives": 5, "bank_dtype": "bfloat16"}),
        pytest.param("moco_v1", 2, {}, marks=pytest.mark.heavy),
        pytest.param("moco_v2", 4, {}, marks=pytest.mark.heavy),
        pytest.param("npid", 4, {}, marks=pytest.mark.heavy),
        pytest.param("pirl", 2, {}, marks=pytest.mark.heavy),
    ],
)
def test_the_service_follows_the_local_trajectory_bit_for_bit(
    address: str, name: str, world: int, settings: dict[str, Any]
) -> None:
    expected = gloo.run(world, train_local, name, settings)
    run_id = f"{name}-{world}"
    with serving(service_config(num_shards=3), run_id):
        actual = gloo.run(world, as_rank, address, run_id, 3, partial(train_served, name, settings))
    for ours, theirs in zip(actual, expected, strict=True):
        for group, tensors in theirs.items():
            for key, value in tensors.items():
                assert torch.equal(ours[group][key], value), f"{group} {key}"
    if name.startswith("moco"):
        assert ours["negatives"]["queue.written"] == 8 * GLOBAL_BATCH


def keys_of(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    numbers = torch.arange(step * BATCH, (step + 1) * BATCH).chunk(world)[rank]
    return numbers[:, None].float().expand(-1, DIM), numbers + 10**6


def write_steps(steps: int, pause_s: float, max_staleness: int, shards: RayShards) -> dict[str, Any]:
    """A rank that enqueues ``steps`` steps; the state at the end and the largest staleness it saw."""
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    queue = ServedQueue(MomentumQueue(SIZE, DIM), shards, batch=BATCH, max_staleness=max_staleness)
    stalest = 0.0
    for step in range(steps):
        queue.negatives()
        stalest = max(stalest, queue.gauges()["queue/staleness"])
        time.sleep(pause_s)
        keys, ids = keys_of(step, rank, world)
        queue.enqueue(keys, ids)
        ids.fill_(-7)  # as a loader does that reuses its memory
    state = {name: value.clone() for name, value in queue.state_dict().items()}
    gauges = queue.gauges()
    queue.close()
    return {"state": state, "stalest": stalest, "gauges": gauges}


def reference(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    queue = MomentumQueue(SIZE, DIM)
    for step in range(steps):
        queue.enqueue(*keys_of(step, 0, 1))
    return dict(queue.state_dict())


def assert_same(ranks: list[dict[str, Any]], expected: dict[str, Tensor]) -> None:
    for rank in ranks:
        assert rank["state"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(rank["state"][name], value), name


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_shards_that_are_killed_again_and_again_lose_nothing(address: str, max_staleness: int) -> None:
    """kill -9 of a random shard at moments that nothing is aligned with, the next one while or after it comes back."""
    run_id, dice = f"killed-{max_staleness}", random.Random(max_staleness)
    work = partial(write_steps, 200, 0.02, max_staleness)
    with serving(service_config(2, max_staleness), run_id), ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(gloo.run, 2, as_rank, address, run_id, 2, work)
        victims: set[int] = set()
        while not ranks.done() and len(victims) < 3:
            time.sleep(dice.uniform(0.1, 1.0))
            shards = [shard["pid"] for shard in status()[run_id] if shard["open"] and shard["step"] > 3]
            if new := set(shards) - victims:
                victims.add(victim := dice.choice(sorted(new)))
                os.kill(victim, signal.SIGKILL)
        assert_same(ranks.result(), reference(200))
    assert len(victims) == 3


def test_staleness_is_bounded_measured_and_gone_at_the_end(address: str) -> None:
    with serving(service_config(2, max_staleness=1), "stale"):
        ranks = gloo.run(2, as_rank, address, "stale", 2, partial(write_steps, 40, 0.0, 1))
    assert max(rank["stalest"] for rank in ranks) == 1, "steps without pause outrun any exchange, up to the bound"
    assert_same(ranks, reference(40))
    gauges = ranks[0]["gauges"]
    assert gauges["queue/step"] == 40
    assert gauges["queue/fill"] == 1
    assert gauges["queue/duplicates"] == 0
    assert gauges["queue/exchange_ms"] > 0


SAMPLES = 97


def bank_step(bank: Any, step: int, rank: int, world: int) -> Tensor:
    """Reads 6 drawn slots and moves 8 others; what was read."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randperm(SAMPLES, generator=generator)[:BATCH].chunk(world)[rank]
    new = torch.randn(BATCH, DIM, generator=generator).chunk(world)[rank]
    bank.expect(ids, 6)
    own, noise, slots = bank.read()
    bank.update(new, 0.5)
    return torch.cat([own.flatten(), noise.float(), slots.flatten()])


def move_slots(steps: int, pause_s: float, checkpoints_url: str, shards: RayShards) -> dict[str, Any]:
    """A rank that saves after every 30 steps; all it read, and its state at the end."""
    rank, world, saved = distributed.rank(), distributed.world_size(), CheckpointStore(checkpoints_url, "run")
    torch.manual_seed(0)
    bank = ServedBank(MemoryBank(SAMPLES, DIM), shards, checkpoints=saved, name="bank")
    seen, most_unsaved = [], 0
    for step in range(steps):
        seen.append(bank_step(bank, step, rank, world))
        most_unsaved = max(most_unsaved, len(bank._unsaved))
        time.sleep(pause_s)
        if (step + 1) % 30 == 0 and rank == 0:
            saved.save(
                TrainState(
                    step=step + 1,
                    seed=0,
                    manifest_digest="",
                    method=dict(bank.state_dict(prefix="bank.")),
                    optimizer={},
                    config="",
                    mlflow_run_id="",
                )
            )
    state = dict(bank.state_dict())
    distributed.any_rank(torch.tensor(False))  # a rank that has gone cannot write again what a shard loses now
    bank.close()
    return {"state": state, "seen": torch.cat(seen), "most_unsaved": most_unsaved}


def moved_slots(steps: int) -> dict[str, Any]:
    """The same with local banks."""
    torch.manual_seed(0)
    bank = MemoryBank(SAMPLES, DIM)
    seen = [bank_step(bank, step, distributed.rank(), distributed.world_size()) for step in range(steps)]
    return {"state": bank.state_dict(), "seen": torch.cat(seen)}


def test_shards_of_a_bank_that_are_killed_again_and_again_lose_nothing(address: str, tmp_path: Path) -> None:
    """kill -9 at any moment: before the first checkpoint, between two, and while the one before comes back."""
    dice, steps = random.Random(0), 200
    expected = gloo.run(2, moved_slots, steps)
    with serving(service_config(2), "bank"), ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(gloo.run, 2, as_rank, address, "bank", 2, partial(move_slots, steps, 0.02, str(tmp_path)))
        victims: set[int] = set()
        while not ranks.done() and len(victims) < 4:
            time.sleep(dice.uniform(0.1, 0.8))
            shards = [shard["pid"] for shard in status()["bank"] if shard["open"] and shard["step"] > 5]
            if new := set(shards) - victims:
                victims.add(victim := dice.choice(sorted(new)))
                os.kill(victim, signal.SIGKILL)
        results = ranks.result()
    assert len(victims) == 4
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours["seen"], theirs["seen"]), "no step read anything else"
        assert ours["most_unsaved"] <= 32, "what a checkpoint holds is forgotten, on the rank that did not save it too"
        for name, value in theirs["state"].items():
            assert torch.equal(ours["state"][name], value), name


@pytest.mark.heavy
def test_shards_lie_on_all_nodes_and_one_of_them_may_die() -> None:
    told = subprocess.run([sys.executable, "-m", "tests.cluster.several_nodes"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def impatient(limit_s: float, work: Any, shards: RayShards) -> Any:
    """``work`` on a rank that gives a shard 1.5 s for an answer, and ``limit_s`` to be back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.cluster.shards._ANSWER_S", 1.0)
        patch.setattr(courier, "_WAIT_S", 0.5)
        patch.setattr(courier, "_LIMIT_S", limit_s)
        return work(shards)


def stop_a_shard(run_id: str) -> int:
    """SIGSTOP one that has taken part in some steps; its process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if pids := [shard["pid"] for shard in status()[run_id] if shard["open"] and shard["step"] > 5]:
            os.kill(pids[-1], signal.SIGSTOP)
            return pids[-1]
    raise AssertionError("no shard has begun")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["queue", "bank"])
def test_a_shard_that_hangs_for_some_seconds_is_waited_for_and_nothing_is_lost(
    address: str, kind: str, tmp_path: Path
) -> None:
    work = partial(write_steps, 100, 0.02, 0) if kind == "queue" else partial(move_slots, 100, 0.02, str(tmp_path))
    with serving(service_config(2), f"stopped-{kind}"), ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(gloo.run, 2, as_rank, address, f"stopped-{kind}", 2, partial(impatient, 60.0, work))
        stopped = stop_a_shard(f"stopped-{kind}")
        time.sleep(5)
        assert not ranks.done()
        os.kill(stopped, signal.SIGCONT)
        results = ranks.result()
    if kind == "queue":
        return assert_same(results, reference(100))
    for ours, theirs in zip(results, gloo.run(2, moved_slots, 100), strict=True):
        assert torch.equal(ours["seen"], theirs["seen"])


def told_of_a_hang(checkpoints_url: str, shards: RayShards) -> str:
    with pytest.raises(ServiceError) as caught:
        move_slots(10**6, 0.02, checkpoints_url, shards)
    return str(caught.value)


@pytest.mark.heavy
def test_a_shard_that_hangs_for_good_ends_the_run_with_an_error(address: str, tmp_path: Path) -> None:
    with serving(service_config(2), "hung"), ThreadPoolExecutor(1) as pool:
        work = partial(impatient, 4.0, partial(told_of_a_hang, str(tmp_path)))
        ranks = pool.submit(gloo.run, 2, as_rank, address, "hung", 2, work)
        stopped = stop_a_shard("hung")
        began = time.monotonic()
        try:
            messages = ranks.result()
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert time.monotonic() < began + 20
    for message in messages:
        assert re.search(r"not all 2 shards are back after 4 s; look for dead nodes|waited 4 s in vain for", message)


def go_on(state: dict[str, Tensor], steps: range, shards: RayShards) -> dict[str, Any]:
    """A rank of a new worker group, from a checkpoint."""
    replica = MomentumQueue(SIZE, DIM)
    replica.load_state_dict(state)
    queue = ServedQueue(replica, shards, batch=BATCH, max_staleness=0)
    for step in steps:
        queue.enqueue(*keys_of(step, distributed.rank(), distributed.world_size()))
    result = {"state": {name: value.clone() for name, value in queue.state_dict().items()}}
    queue.close()
    return result


def test_a_worker_group_of_another_size_goes_on_from_a_checkpoint(address: str) -> None:
    """The first group was 15 steps further when it ended; its shards are still there, and forget them."""
    with serving(service_config(2), "resized"):
        gloo.run(2, as_rank, address, "resized", 2, partial(write_steps, 25, 0.0, 0))
        ranks = gloo.run(4, as_rank, address, "resized", 2, partial(go_on, reference(10), range(10, 20)))
        assert [shard["step"] for shard in status()["resized"]] == [20] * 2
    assert_same(ranks, reference(20))


def test_what_the_shards_hold_shows(address: str) -> None:
    with serving(service_config(3), "shown"):
        assert [shard["open"] for shard in status()["shown"]] == [False] * 3
        write_steps(5, 0.0, 0, shards_of("shown", 3))
        shown = status()["shown"]
        told = subprocess.run(
            [sys.executable, "-m", "jobs.queue", "status", "--address", address], capture_output=True, text=True
        )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"shown\n  shard-0  queue {SIZE} x {DIM} float32, 100% full  step 5 + 0 in flight")
    assert re.search(r"\n  rank 0  staleness 0 steps  waited [\d.]+ ms  exchange [\d.]+ ms  ", told.stdout)
    assert [shard["step"] for shard in shown] == [5] * 3
    rows = (SIZE + 3 * BATCH) / 3 + 1
    assert all(shard["held_bytes"] <= rows * (DIM * 4 + 8) for shard in shown), "keys, ids, and three steps in flight"
    assert "shown" not in status()


def test_status_without_a_cluster_is_one_message() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "jobs.queue", "status", "--address", "127.0.0.1:9"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert told.stderr.startswith("error: no Ray answers at 127.0.0.1:9: ")


def silent_rank(shards: RayShards) -> str:
    """Rank 1 hands over nothing; what rank 0 is told."""
    queue = ServedQueue(MomentumQueue(SIZE, DIM), shards, batch=BATCH, max_staleness=0)
    courier._LIMIT_S, courier._WAIT_S = 2.0, 0.5
    message = ""
    if distributed.rank() == 0:
        queue.enqueue(*keys_of(0, 0, 2))
        with pytest.raises(ServiceError) as caught:
            queue.negatives()
        message = str(caught.value)
    distributed.any_rank(torch.tensor(False))  # rank 1 lives on until rank 0 has given up
    queue.abandon()
    courier._LIMIT_S, courier._WAIT_S = 120.0, 5.0
    return message


def test_a_rank_that_hangs_is_an_error_and_not_a_wait_for_ever(address: str) -> None:
    with serving(service_config(1), "silent"):
        message, _ = gloo.run(2, as_rank, address, "silent", 1, silent_rank)
    assert "waited 2 s in vain for the keys below 8; a rank or a shard that hangs" in message


def test_keys_of_another_width_or_number_are_refused_at_once(address: str) -> None:
    with serving(service_config(1), "widths"):
        with pytest.raises(
            ServiceError, match="queue of 20 keys is smaller than the 3 steps of 8 that a replica may lag"
        ):
            ServedQueue(MomentumQueue(SIZE, DIM), shards_of("widths", 1), batch=BATCH, max_staleness=2)
        queue = ServedQueue(MomentumQueue(SIZE, DIM), shards_of("widths", 1), batch=BATCH, max_staleness=0)
        with pytest.raises(ServiceError, match="keys of 3 numbers do not fit a queue of 4"):
            queue.enqueue(torch.zeros(BATCH, 3), torch.arange(BATCH))
        with pytest.raises(ServiceError, match="5 keys of each of 1 ranks are not the 8 of a step"):
            queue.enqueue(torch.zeros(5, DIM), torch.arange(5))
        queue.close()


def test_two_drivers_of_one_run_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.shards._NAME_WAIT_S", 1.0)
    with (
        serving(service_config(1), "twice"),
        pytest.raises(QueueInUseError, match="another driver is training twice"),
        serving(service_config(1), "twice"),
    ):
        pass


DRIVER = """
import sys, time, ray
from pipeline.cluster.shards import serving, status
from pipeline.negatives.config import NegativesConfig

ray.init(address=sys.argv[1], log_to_driver=False)
with serving(NegativesConfig(backend="service", num_shards=2), "orphan"):
    assert len(status()["orphan"]) == 2
    print("serving", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("end", ["exit", "kill -9"])
def test_a_driver_that_ends_leaves_no_actor(address: str, end: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, address, "1" if end == "exit" else "600"], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "serving\n"
    pids = [shard["pid"] for shard in status().get("orphan", [])]
    assert len(pids) == 2
    if end == "kill -9":
        driver.kill()
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 30
    while "orphan" in status() or any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, status()
        time.sleep(0.2)


def rank_pid() -> int:
    """The process of a rank of the worker group that trains in this process's Ray."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            if b"RayTrainWorker" in (entry / "cmdline").read_bytes() and os.getpid() in ancestors(entry):
                return int(entry.name)
    raise AssertionError("no rank is alive")


def ancestors(process: Path) -> list[int]:
    """The process ids above that of a folder of /proc."""
    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return [parent, *ancestors(Path(f"/proc/{parent}"))] if parent > 1 else []


def undisturbed(config: Config, checkpoints_url: str) -> None:
    """This rank's part of the run with the local queue and without Ray."""
    store = CheckpointStore(checkpoints_url, "run")
    fit(config, Manifest.load(config.shards_url), store, device=torch.device("cpu"), report=lambda _: None)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "method",
    [
        ("method.name=moco_v2", "method.queue_size=2500", "method.ema_decay=0.9"),
        # hard negatives follow up to rounding only: of 500 x 5,000 similarities some are equal but for their last bit
        ("method.name=npid", "method.num_samples=5000", "method.num_negatives=500"),
    ],
    ids=["queue", "bank"],
)
def test_a_run_whose_shard_and_whose_rank_are_killed_ends_with_the_weights_of_the_undisturbed(
    address: str, tmp_path: Path, method: tuple[str, ...]
) -> None:
    """On real digits through Ray Train; then the same run on local replicas, compared to the last bit."""
    config = load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={tmp_path}",
            *("model.args={channels: [4, 8, 8, 16]}", "train.global_batch_size=1000", "data.loader_workers=0"),
            *("train.epochs=4", "train.checkpoint_every_steps=4", "train.log_every_steps=1"),
            *method,
            *("negatives.backend=service", "negatives.num_shards=2"),
        ],
    )
    manifest = prepare_data(config)
    run = Run(config, manifest.digest)
    reports: list[Report] = []

    def on_report(report: Report) -> None:
        reports.append(report)
        if isinstance(report, WorkerFailure) or len(reports) not in (3, 10):
            return
        if len(reports) == 3:
            os.kill(status()[run.id][1]["pid"], signal.SIGKILL)
        else:
            os.kill(rank_pid(), signal.SIGKILL)

    pretrain(config, manifest, mlflow_run_id="", on_report=on_report)
    steps = [report.step for report in reports if isinstance(report, Progress)]
    assert steps[-1] == 16
    assert len(steps) > 16, "the group started again from a checkpoint"
    assert all(
        {"queue/step", "bank/step"} & report.metrics.keys() for report in reports if isinstance(report, Progress)
    )
    assert run.id not in status()

    local = override(config, ["negatives.backend=local", "negatives.num_shards=1"])
    assert local.run_id(manifest.digest) == run.id, "the backend does not change what the run is"
    gloo.run(2, undisturbed, local, str(tmp_path / "undisturbed"))
    expected = CheckpointStore(str(tmp_path / "undisturbed"), "run").load(16)
    actual = run.checkpoints.load(16)
    assert actual["method"].keys() == expected["method"].keys()
    for name, value in expected["method"].items():
        assert torch.equal(actual["method"][name], value), name
