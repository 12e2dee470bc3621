"""The training loop: plain PyTorch, the same for every method, for one process or many.

``fit`` knows nothing of Ray or MLflow: whoever starts the processes sets up the process group, and gets
``Progress`` reports. Everything scheduled is a pure function of the global step, data and augmentation are a
pure function of (manifest, seed, step), so a run resumed from a checkpoint follows the undisturbed one.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import yaml
from torch import Tensor, nn

from pipeline import distributed, schedules, storage
from pipeline.accumulation import backward_in_parts, check_accumulation
from pipeline.checkpoint import CheckpointError, CheckpointStore, TrainState
from pipeline.collapse import NonFiniteLossError, act_on_collapse, diagnose, stop_unless_finite
from pipeline.config import Config, TrainConfig, dump
from pipeline.data.batch import Batch
from pipeline.data.device_views import DeviceColour
from pipeline.data.loader import Loader, normalize
from pipeline.data.manifest import Manifest
from pipeline.methods.base import Method, method_class
from pipeline.models.backbone import random_backbone
from pipeline.optim import build_optimizer, ema_update_, match_layouts_, peak_lr, set_lr
from pipeline.progress import Progress
from pipeline.quarantine import Quarantine
from pipeline.selection import Selection


def build_method(config: Config) -> Method:
    """The method around a freshly initialised backbone; weights depend on the config and the seed alone."""
    backbone = random_backbone(config.model, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return method_class(config.method.name)(backbone, config.method)


@dataclass(frozen=True)
class Hyperparameters:
    """What the schedules say about one step."""

    lr: float
    ema_decay: float | None  # None: the method has no momentum encoder


def hyperparameters(config: Config, step: int, steps_per_epoch: int) -> Hyperparameters:
    """Learning rate and EMA decay at ``step``: a pure function, so nothing of it is saved."""
    total_steps = config.train.epochs * steps_per_epoch
    decay: float | None = getattr(config.method, "ema_decay", None)
    decay_end: float | None = getattr(config.method, "ema_decay_end", decay)
    peak = peak_lr(config.optim, config.train.global_batch_size)
    return Hyperparameters(
        lr=schedules.warmup_cosine(
            step,
            warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
            total_steps=total_steps,
            peak=peak,
            end=peak * config.optim.end_lr,
        ),
        ema_decay=None
        if decay is None or decay_end is None
        else schedules.cosine(step, total_steps=total_steps, start=decay, end=decay_end),
    )


def make_loader(config: Config, manifest: Manifest, device: torch.device) -> Loader:
    """This rank's loader over the training split."""
    return Loader(
        manifest,
        "train",
        config.method.views,
        image_size=config.model.image_size,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        num_workers=config.data.loader_workers,
        mirror=config.data.mirror,
        colour=loader_colours(config, device),
        pin_memory=device.type == "cuda",
    )


def loader_colours(config: Config, device: torch.device) -> bool:
    """Whether the loader's workers do the colour, or ``to_device``."""
    return config.data.colour_on == "cpu" or (config.data.colour_on == "auto" and device.type == "cpu")


device_colour = functools.cache(DeviceColour)


def to_device(batch: Batch, config: Config, device: torch.device) -> Batch:
    """uint8 views on the CPU -> normalised floats on ``device``; a quarter of the bytes cross the bus."""
    mean, std = config.data.mean, config.data.std
    views = [view.to(device, non_blocking=True) for view in batch.views]
    if batch.draws is None:
        views = [normalize(view, mean, std) for view in views]
    else:
        views = device_colour(config.method.views, mean, std, device)(views, batch.draws)
    if config.train.channels_last:
        views = [view.to(memory_format=torch.channels_last) for view in views]
    return Batch(views, batch.sample_ids.to(device, non_blocking=True))


def prepare(method: Method, config: TrainConfig) -> nn.Module:
    """What ``train_step`` calls: ``method`` in its memory format, compiled, inside DistributedDataParallel."""
    if config.channels_last:
        method.to(memory_format=torch.channels_last)
    if config.compile:
        method.backbone.compile()
        for online, momentum in method.momentum_pairs():
            if online is method.backbone:
                momentum.compile()
    check_accumulation(method, config.micro_batches)
    return distributed.data_parallel(method) if config.micro_batches == 1 else method


def train_step(
    model: nn.Module,
    method: Method,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    values: Hyperparameters,
    config: TrainConfig,
) -> dict[str, Tensor]:
    """Forward, backward, step, EMA. Returns detached metrics of this rank, still on the device.

    NonFiniteLossError on all ranks, before the update, if any rank's loss is not finite.
    """
    set_lr(optimizer, values.lr)
    optimizer.zero_grad(set_to_none=True)
    autocast = torch.autocast(batch.views[0].device.type, torch.bfloat16, enabled=config.precision == "bf16")
    if config.micro_batches > 1:
        loss, metrics = backward_in_parts(method, batch, config.micro_batches, autocast)
    else:
        with autocast:
            loss, metrics = model(batch)
        loss.backward()
    stop_unless_finite(loss, batch.sample_ids)
    optimizer.step()
    if values.ema_decay is not None:
        ema_update_(method.momentum_pairs(), values.ema_decay)
    return {"loss": loss.detach(), **metrics}


def fit(
    config: Config,
    manifest: Manifest,
    checkpoints: CheckpointStore,
    *,
    device: torch.device,
    report: Callable[[Progress], None],
    serve_negatives: Callable[[Method], None] | None = None,
    mlflow_run_id: str = "",
) -> Method:
    """Train to the last epoch, from the newest checkpoint if there is one.

    Called by every rank, with the process group (if any) already set up. ``report`` is called on rank 0, every
    ``train.log_every_steps`` steps and where ``evaluate.selection`` scores the encoder. ``serve_negatives`` may
    replace where the restored method keeps its negatives. Returns the trained method, equal on all ranks.
    """
    method = build_method(config).to(device)
    if config.train.global_bn:
        method = distributed.convert_global_bn(method, config.train.bn_ranks_per_group)
    optimizer = build_optimizer(method, config.optim, peak_lr(config.optim, config.train.global_batch_size))
    loader = make_loader(config, manifest, device)
    total_steps = config.train.epochs * loader.steps_per_epoch
    quarantine = Quarantine(
        checkpoints,
        num_samples=manifest.split("train").num_samples,
        max_bad_share=config.data.max_bad_share,
    )
    selection = Selection(config, manifest, loader.steps_per_epoch, checkpoints)

    start = distributed.broadcast_int(checkpoints.latest_step() or 0 if distributed.rank() == 0 else 0)
    if start:
        restore(checkpoints.load(start), method, optimizer, config, manifest)
    if serve_negatives is not None:
        serve_negatives(method)
    model = prepare(method, config.train)
    match_layouts_(optimizer)
    method.train()
    diagnosis: dict[str, Tensor] = {}

    meter = _Meter(config, total_steps, loader.steps_per_epoch, start)
    for step, batch in enumerate(meter.timed(loader.batches(start, total_steps)), start):
        # Dropout and drop path: a resumed run draws the same masks, another number of ranks draws others.
        torch.manual_seed(hash((config.seed, step, distributed.rank())))
        values = hyperparameters(config, step, loader.steps_per_epoch)
        try:
            metrics = train_step(model, method, optimizer, to_device(batch, config, device), values, config.train)
        except NonFiniteLossError as error:
            raise save_batch(error, step, checkpoints) from None
        done = step + 1
        if done % config.train.diagnose_every_steps == 0:
            diagnosis = diagnose(*method.observed)
            act_on_collapse(diagnosis, done, config.train.on_collapse)
        with meter.paused():
            scores = selection.after(done, method.backbone, device)
        is_logged = done % config.train.log_every_steps == 0 or done == total_steps or bool(scores)
        is_saved = done % config.train.checkpoint_every_steps == 0 or done == total_steps
        if is_logged or is_saved:
            quarantine.gather(loader.quarantine)
        if is_logged:
            measured = _mean_over_ranks(metrics) | diagnosis | scores
            progress = meter.progress(done, measured, values, len(quarantine.samples))
            if distributed.rank() == 0:
                selection.keep(progress)
                report(replace(progress, metrics=progress.metrics | method.gauges()))
        if is_saved and distributed.rank() == 0:
            checkpoints.save(snapshot(done, method, optimizer, config, manifest, mlflow_run_id))
    return method


def save_batch(error: NonFiniteLossError, step: int, checkpoints: CheckpointStore) -> NonFiniteLossError:
    """``error`` with the step and where the sample ids of its global batch were saved, by rank 0."""
    url = storage.join(checkpoints.url, f"non-finite-{step:09d}.json")
    if distributed.rank() == 0:
        storage.write_bytes(url, json.dumps({"step": step, "sample_ids": error.sample_ids}).encode())
    return NonFiniteLossError(f"step {step}: {error}; the ids of its samples are in {url}", error.sample_ids)


def snapshot(
    step: int,
    method: Method,
    optimizer: torch.optim.Optimizer,
    config: Config,
    manifest: Manifest,
    mlflow_run_id: str,
) -> TrainState:
    """Everything that resumes after ``step`` optimizer steps."""
    return TrainState(
        step=step,
        seed=config.seed,
        manifest_digest=manifest.digest,
        method=method.state_dict(),
        optimizer=optimizer.state_dict(),
        config=dump(config),
        mlflow_run_id=mlflow_run_id,
    )


def restore(
    state: TrainState, method: Method, optimizer: torch.optim.Optimizer, config: Config, manifest: Manifest
) -> None:
    """Load ``state`` in place. CheckpointError if it was written for other data, another seed or another model.

    The optimizer's options stay the config's: a run of PBT begins with another run's state under values of its own.
    """
    if (state["manifest_digest"], state["seed"]) != (manifest.digest, config.seed):
        raise CheckpointError(
            f"the checkpoint of step {state['step']} was written for seed {state['seed']} and shards "
            f"{state['manifest_digest'][:12]}, not seed {config.seed} and shards {manifest.digest[:12]}; "
            "give the run another name"
        )
    restore_method(state, method, config)
    saved = state["optimizer"]
    options = optimizer.state_dict()["param_groups"]
    groups = [own | {"params": old["params"]} for own, old in zip(options, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})


def restore_method(state: TrainState, method: Method, config: Config) -> None:
    """Load the weights of ``state`` in place. CheckpointError if what they mean is not what ``config`` says."""
    saved, own = yaml.safe_load(state["config"]) or {}, config.model_dump(mode="json")
    for section, key in _OF_THE_STATE:
        old = saved.get(section, {}).get(key, own[section][key])
        if old != own[section][key]:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} was written for {section}.{key}={old}, not "
                f"{section}.{key}={own[section][key]}; give the run another name"
            )
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint of step {state['step']} does not fit method.name={config.method.name} around "
            f"model.name={config.model.name}: {str(error).splitlines()[-1].strip()} Give the run another name"
        ) from error


# What a checkpoint's tensors and steps depend on; all else may differ where PBT adopts one.
_OF_THE_STATE = (
    ("model", "name"),
    ("model", "args"),
    ("method", "name"),
    ("optim", "name"),
    ("train", "global_batch_size"),
)


def _mean_over_ranks(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """One collective for all of them."""
    means = distributed.all_reduce_mean(torch.stack([value.float() for value in metrics.values()]))
    return dict(zip(metrics, means, strict=True))


class _Meter:
    """Throughput, and the share of time spent waiting for data, between two reports."""

    def __init__(self, config: Config, total_steps: int, steps_per_epoch: int, start: int) -> None:
        self._batch_size = config.train.global_batch_size
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._since, self._since_step, self._waited_s = time.perf_counter(), start, 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """``batches``, with the time that ``next`` takes counted as waiting."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside counts neither as training nor as waiting."""
        stopped = time.perf_counter()
        yield
        self._since += time.perf_counter() - stopped

    def progress(self, step: int, metrics: dict[str, Tensor], schedule: Hyperparameters, bad_samples: int) -> Progress:
        """The report after ``step`` steps; starts the next interval."""
        values = {name: value.item() for name, value in metrics.items()}  # waits for the device
        values |= {name: value for name, value in asdict(schedule).items() if value is not None}
        now = time.perf_counter()
        elapsed = now - self._since
        report = Progress(
            step=step,
            total_steps=self._total_steps,
            epoch=(step - 1) // self._steps_per_epoch,
            images_per_s=(step - self._since_step) * self._batch_size / elapsed,
            data_wait=self._waited_s / elapsed,
            metrics=values,
            bad_samples=bad_samples,
        )
        self._since, self._since_step, self._waited_s = now, step, 0.0
        return report
