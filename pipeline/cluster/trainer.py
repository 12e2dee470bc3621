"""Pretraining on Ray: the Train driver, the function each worker runs, and the stage that follows.

Ray Train starts the worker group, its process group, and both again after a failure. Checkpoints are our own
(checkpoint.py): a restarted group finds the newest one by the run's name.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import yaml
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback

from pipeline.checkpoint import CheckpointStore
from pipeline.cluster.controller import Announcer, GiveUpPolicy, hopeless
from pipeline.cluster.inbox import Inbox, Report, Started, WorkerFailure, WorkerWaiting
from pipeline.cluster.shards import RayShards, serving
from pipeline.config import Config, dump
from pipeline.data.manifest import Manifest
from pipeline.errors import DeterministicError, UserError
from pipeline.methods.base import Method
from pipeline.negatives.service import negatives_service
from pipeline.runs import Run
from pipeline.secrets import redacted
from pipeline.stages import evaluate_and_export
from pipeline.train import fit
from pipeline.waiting import TELL_EVERY_S, told_to

_log = logging.getLogger(__name__)
_COLLECTIVE_TIMEOUT_S = 120  # Ray's default of 1800 s keeps a group waiting half an hour for a dead rank


class TrainingError(UserError):
    """The worker group failed more often than ``cluster.max_failures`` allows."""


def pretrain(
    config: Config,
    manifest: Manifest,
    *,
    mlflow_run_id: str,
    on_report: Callable[[Report], None],
    on_start: Callable[[Started], None] | None = None,
) -> None:
    """Train on the connected cluster until the last checkpoint is written.

    ``on_report`` is called in a thread of the driver, and so is ``on_start``: before a worker group is asked for, and
    when one stands. TrainingError when ``cluster.max_failures`` restarts were not enough; it names what each rank died
    of. A rank's DeterministicError, if the run collapsed or diverged, without a restart.
    """
    inbox = Inbox()
    run_id = config.run_id(manifest.digest)
    told_at = 0.0

    def forward(report: Any) -> None:
        nonlocal told_at
        if isinstance(report, Started):
            if on_start is not None:
                on_start(report)
        elif isinstance(report, WorkerWaiting):
            if time.monotonic() - told_at >= TELL_EVERY_S:  # one rank speaks for all that a dead store holds up
                told_at = time.monotonic()
                on_report(report)
        else:
            on_report(report)

    with (
        serving(config.negatives, run_id) as shards,
        TemporaryDirectory(prefix="parallax-ray-") as scratch,  # Ray's bookkeeping; nothing of ours is in it
    ):
        trainer = _Trainer(
            _train_worker,
            train_loop_config={
                "config": dump(config),  # as text: Ray's controller unpickles it, and need not import all it refers to
                "manifest_url": manifest.url,
                "mlflow_run_id": mlflow_run_id,
                "inbox": inbox.actor,
                "shards": shards,
            },
            torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=config.cluster.num_workers,
                use_gpu=config.cluster.gpus_per_worker > 0,
                resources_per_worker=_resources(config),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
                callbacks=[Announcer(inbox.actor)] if on_start is not None else [],
            ),
        )
        try:
            with inbox.forwarding(forward):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            if (cause := hopeless(error)) is not None:
                raise cause from error
            raise TrainingError(explain(error, config.cluster.max_failures)) from error


class _Trainer(TorchTrainer):
    """Gives up where a restart is in vain, and leaves out two callbacks that cost an actor each, 3 s of a core per run.

    Our workers have no Ray Datasets; placement groups end with their driver, or the sweep's removes them.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        policy = GiveUpPolicy(self.run_config.failure_config)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})


def evaluate(config: Config, manifest: Manifest, git_sha: str) -> None:
    """Evaluate and export the trained encoder in a task with one worker's resources."""
    resources = _resources(config)
    task = _evaluate_task.options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))
    try:
        ray.get(task.remote(config, manifest.url, git_sha))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None  # its message alone, without the task's stack trace
        raise


def _resources(config: Config) -> dict[str, float]:
    resources = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpus_per_worker:
        resources["GPU"] = config.cluster.gpus_per_worker
    return resources


def _train_worker(job: dict[str, Any]) -> None:
    """One rank: the process group is up, the device is chosen; the rest is ``fit``."""
    config, inbox = Config.model_validate(yaml.safe_load(job["config"])), job["inbox"]
    manifest = Manifest.load(job["manifest_url"])
    rank = ray.train.get_context().get_world_rank()

    def tell(line: str) -> None:
        _log.warning(line)
        inbox.put.remote(WorkerWaiting(rank, line))

    try:
        checkpoints = Run(config, manifest.digest).checkpoints
        with told_to(tell), _negatives(config, job["shards"], checkpoints) as serve_negatives:
            fit(
                config,
                manifest,
                checkpoints,
                device=ray.train.torch.get_device(),
                report=lambda progress: inbox.put.remote(progress),
                serve_negatives=serve_negatives,
                mlflow_run_id=job["mlflow_run_id"],
            )
    except DeterministicError:
        raise  # the group does not restart: the driver tells why
    except Exception as error:
        reason = redacted(f"{type(error).__name__}: {error}")
        ray.get(inbox.put.remote(WorkerFailure(rank, reason)))
        raise


def _negatives(
    config: Config, shards: list[ActorHandle], checkpoints: CheckpointStore
) -> AbstractContextManager[Callable[[Method], None] | None]:
    if config.negatives.backend == "local":
        return nullcontext()
    return negatives_service(
        RayShards(shards),
        batch=config.train.global_batch_size,
        max_staleness=config.negatives.max_staleness,
        checkpoints=checkpoints,
    )


def explain(error: ray.train.TrainingFailedError, max_failures: int) -> str:
    """What the ranks died of: our own errors in full, of others (Ray's have a dozen lines) the last line."""
    ranks: dict[str, list[str]] = {}
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        lines = str(failure).strip().splitlines() or [""]
        reason = "\n".join(lines if isinstance(failure, UserError) else lines[-1:])
        ranks.setdefault(f"{type(failure).__name__}: {reason}", []).append(str(rank))
    causes = "\n".join(f"rank {', '.join(numbers)}: {reason}" for reason, numbers in ranks.items())
    return (
        f"training failed, after at most {max_failures} restarts (cluster.max_failures); mend the cause and submit the "
        f"same config again: it resumes from the newest checkpoint\n{causes or error}"
    )


@ray.remote
def _evaluate_task(config: Config, manifest_url: str, git_sha: str) -> None:
    device = torch.device("cuda" if config.cluster.gpus_per_worker else "cpu")
    evaluate_and_export(config, Manifest.load(manifest_url), device=device, git_sha=git_sha)
