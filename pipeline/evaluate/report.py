"""What the trained encoder is worth, beside two baselines measured the same way: random weights and raw pixels.

A number without the baselines says little: on MNIST, raw pixels alone exceed 90 % with weighted kNN. The train split
is the bank of the kNN and trains the probe; the validation split is only ever predicted.

The baseline is as strong as it can be had for nothing. Raw pixels compared by cosine as they are would be a straw man:
on drawings on white 52.9 %, and 60.7 % once each image's mean is taken off. They get the better of two centrings: on
the mean of the train images, as every representation, or each image on its own mean.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.assemble import MAX_BAD_SHARE
from pipeline.data.loader import normalize, read_images
from pipeline.data.manifest import Manifest
from pipeline.errors import DeterministicError
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.diagnostics import alignment, embedding_std, rank_me, uniformity
from pipeline.evaluate.intervals import accuracy_interval, difference_interval
from pipeline.evaluate.knn import knn_predict
from pipeline.evaluate.linear import fit_linear_probe
from pipeline.model_card import Score
from pipeline.models.backbone import Backbone, random_backbone

_PIXEL_SIZE = 32  # larger images are averaged down for the pixel baseline: 224 px would be 150,528 features
_DIAGNOSTIC_IMAGES = 8192  # at most; RankMe's matrix and the uniformity's pairs grow with them
_LABELS = {
    "knn": "weighted kNN, top-1",
    "linear": "linear probe, top-1",
    "linear_l2": "  its l2",
    "embedding_std": "embedding std (1 spread, 0 collapsed)",
    "rank_me": "RankMe (1 collapsed)",
    "alignment": "alignment (0 invariant)",
    "uniformity": "uniformity (0 collapsed)",
}
_REPRESENTATIONS = ("encoder", "random_init", "raw_pixels")


class NonFiniteFeaturesError(DeterministicError):
    """The encoder's features are infinite or not numbers."""


class EvaluationReport(BaseModel):
    """The numbers, or in ``notes`` why there are none. JSON by ``model_dump_json``, text by ``table``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_images: int  # labelled and decodable ones: the bank and the probe's training set
    validation_images: int  # labelled and decodable ones
    num_classes: int
    chance: float | None = None  # accuracy of always naming the train split's most frequent class
    scores: tuple[Score, ...] = ()  # accuracies are shares in [0, 1]
    pixels_centred_on: Literal["train", "image"] | None = None  # for kNN: the train images' mean, or each image's own
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker: ``knn/encoder``, ``linear/raw_pixels``, ``rank_me/random_init``, ``chance`` ..."""
        flat = {
            f"{score.metric}/{representation}": value
            for score in self.scores
            for representation in _REPRESENTATIONS
            if (value := getattr(score, representation)) is not None
        }
        return flat if self.chance is None else {**flat, "chance": self.chance}

    def table_rows(self) -> tuple[Score, ...]:
        """The rows of the model card."""
        return self.scores

    def doubts(self) -> tuple[str, ...]:
        """What to say of the metrics in which raw pixels may equal the encoder."""
        return tuple(doubt for score in self.scores if (doubt := score.doubt()))

    def table(self) -> str:
        """Aligned text, one row per metric, one column per representation, notes below."""
        lines = []
        if self.scores:
            width = max(len(_LABELS[score.metric]) for score in self.scores)
            lines.append(f"{'':{width}}" + "".join(f"{name.replace('_', ' '):>13}" for name in _REPRESENTATIONS))
            for score in self.scores:
                cells = (_cell(score, name) for name in _REPRESENTATIONS)
                lines.append(f"{_LABELS[score.metric]:{width}}" + "".join(f"{cell:>13}" for cell in cells))
        if self.chance is not None:
            lines.append(
                f"{self.validation_images:,} validation images, {self.train_images:,} train images, "
                f"{self.num_classes} classes, chance {self.chance:.1%}; ± is half a 95% interval"
            )
            lines.append("kNN: cosine of features less the train images' mean" + _of_pixels(self.pixels_centred_on))
        return "\n".join([*lines, *(f"note: {note}" for note in (*self.doubts(), *self.notes))])


def evaluate_encoder(
    backbone: Backbone,
    manifest: Manifest,
    *,
    config: EvaluateConfig,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    device: torch.device,
    baselines: bool = True,
    max_bad_share: float = MAX_BAD_SHARE,
) -> EvaluationReport:
    """Weighted kNN and linear probe on the validation split, and collapse diagnostics.

    ``backbone`` is on ``device``; it is evaluated in eval mode and gets its modes back. ``seed`` is the run's: it gives
    the random baseline the weights that training began with, and draws the probe's held-out rows. Unlabelled images
    take part in the diagnostics only; without labels of 2 classes in both splits the report says so instead. Of the
    labelled train images at most ``config.train_images`` are used, evenly spaced, which a note tells. Images
    that cannot be decoded are left out, at most ``max_bad_share`` of a split. The notes count both.
    The diagnostics use at most 8192 images, evenly spaced over the validation split (the first of the train split
    if there is none); the positive of an image for ``alignment`` is its central 7/8, enlarged to full size.
    Raises NonFiniteFeaturesError.
    """
    encoders: dict[str, nn.Module] = {"encoder": backbone}
    if baselines:
        encoders["random_init"] = random_backbone(backbone.config, seed).to(device)

    def encode(split: str, ids: NDArray[np.int64], *, pixels: bool = False, crop: bool = False) -> _Encoded:
        batches = read_images(manifest, split, backbone.config.image_size, config.batch_size, max_bad_share)
        return _encode(batches, ids, encoders, mean, std, device, pixels=pixels, crop=crop)

    train_ids, train_labels = _samples(manifest, "train")
    validation_ids, validation_labels = _samples(manifest, "validation")
    labelled_train, labelled_validation = train_ids[train_labels >= 0], validation_ids[validation_labels >= 0]
    num_classes = len(np.unique(train_labels[train_labels >= 0]))
    known = labelled_train[evenly(len(labelled_train), config.train_images or len(labelled_train))]
    num_train, num_validation = len(known), len(labelled_validation)
    obstacle = _obstacle(num_train, num_validation, num_classes)
    notes: list[str] = []
    scores: list[Score] = []
    chance = pixels_centred_on = None

    split, ids = ("validation", validation_ids) if len(validation_ids) else ("train", train_ids[:_DIAGNOSTIC_IMAGES])
    diagnosed = ids[:: max(1, -(-len(ids) // _DIAGNOSTIC_IMAGES))]
    with eval_mode(encoders.values()):
        if obstacle:
            notes.append(f"no kNN and no linear probe: {obstacle}")
            encoded = encode(split, diagnosed)
        else:
            encoded = encode(split, np.union1d(diagnosed, labelled_validation), pixels=baselines)
            bank = encode("train", known, pixels=baselines)
            queries = encoded.where(encoded.labels >= 0)
            unlabelled = len(train_ids) - len(labelled_train), len(validation_ids) - num_validation
            notes += _left_out("without a label", *unlabelled)
            if len(known) < len(labelled_train):
                notes.append(
                    f"kNN and linear probe know {len(known):,} of {len(labelled_train):,} labelled train images, "
                    "evenly spaced; evaluate.train_images=null takes all"
                )
            notes += _left_out("not decodable", num_train - len(bank.ids), num_validation - len(queries.ids))
            num_train, num_validation = len(bank.ids), len(queries.ids)
            chance = _share(queries.labels == bank.labels.mode().values)
            if config.knn_k > len(bank.labels):
                notes.append(
                    f"evaluate.knn_k={config.knn_k} exceeds the {len(bank.labels)} labelled train images: all vote"
                )
            knn, pixels_centred_on = _knn(bank, queries, config, device)
            scores += [knn, *_linear(bank, queries, config, seed, device)]
        if len(diagnosed) < 2:
            notes.append(f"no diagnostics: they need 2 images, the {split} split has {len(diagnosed)}")
        else:
            sample = encoded.where(torch.from_numpy(_contains(diagnosed, encoded.ids.numpy())))
            scores += _diagnostics(sample, encode(split, diagnosed, crop=True), encoders)
    return EvaluationReport(
        train_images=num_train,
        validation_images=num_validation,
        num_classes=num_classes,
        chance=chance,
        scores=tuple(scores),
        pixels_centred_on=pixels_centred_on,
        notes=tuple(notes),
    )


class _Encoded(NamedTuple):
    """Some images of a split in every representation, on the CPU, in id order."""

    ids: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -1 = none
    features: dict[str, Tensor]  # representation -> (N, D)

    def where(self, rows: Tensor) -> "_Encoded":
        """The rows where the (N,) mask holds."""
        return _Encoded(
            self.ids[rows], self.labels[rows], {name: values[rows] for name, values in self.features.items()}
        )


def _samples(manifest: Manifest, split: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """(ids, labels) of a split, both empty if the manifest has no such split."""
    if split not in manifest.splits:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    samples = manifest.split(split)
    return samples.id, samples.label


def _obstacle(labelled_train: int, labelled_validation: int, num_classes: int) -> str | None:
    """Why there is nothing to classify, if so."""
    if labelled_train == 0:
        return "the train split has no labels"
    if labelled_validation == 0:
        return "there is no validation split with labels"
    if num_classes < 2:
        return "all labels of the train split are the same; classification needs 2 classes"
    return None


def _left_out(why: str, train: int, validation: int) -> list[str]:
    """A note with the counts, if any."""
    note = f"left out of kNN and linear probe, {why}: {train:,} train images, {validation:,} validation images"
    return [note] if train or validation else []


@torch.inference_mode()
def _encode(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    ids: NDArray[np.int64],
    encoders: dict[str, nn.Module],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    *,
    pixels: bool,
    crop: bool,
) -> _Encoded:
    """The features of the images named by ``ids``; reading stops after the last of them."""
    wanted = np.sort(ids)
    found: list[tuple[Tensor, Tensor]] = []
    features: dict[str, list[Tensor]] = {}
    for batch_ids, images, labels in batches:
        rows = torch.from_numpy(_contains(wanted, batch_ids.numpy()))
        if rows.any():
            found.append((batch_ids[rows], labels[rows]))
            images = images[rows]
            if pixels:
                features.setdefault("raw_pixels", []).append(_pixels(images))
            inputs = normalize(images.to(device), mean, std)
            if crop:
                inputs = _central_crop(inputs)
            inputs = inputs.contiguous(memory_format=torch.channels_last)  # 1.8x for a small ResNet on a CPU core
            for name, encoder in encoders.items():
                features.setdefault(name, []).append(encoder(inputs).float().cpu())
        if batch_ids[-1] >= wanted[-1]:
            break
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    for name, values in joined.items():
        if not values.isfinite().all():
            raise NonFiniteFeaturesError(
                f"features of {name} are not finite: its weights or BatchNorm statistics have diverged; try a smaller "
                "optim.lr, or more optim.warmup_epochs"
            )
    return _Encoded(torch.cat([i for i, _ in found]), torch.cat([y for _, y in found]), joined)


def _contains(ids: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``asked`` are in the sorted ``ids``; np.isin would sort a million ids again for each batch."""
    found: NDArray[np.bool_] = ids[np.searchsorted(ids, asked).clip(max=len(ids) - 1)] == asked
    return found


def _pixels(images: Tensor) -> Tensor:
    """uint8 (N, 3, S, S) -> (N, 3 * min(S, 32)^2): uint8 as they are, or float32 means over areas."""
    if images.shape[-1] > _PIXEL_SIZE:
        images = F.adaptive_avg_pool2d(images.float(), _PIXEL_SIZE)
    return images.flatten(1)


def _central_crop(images: Tensor) -> Tensor:
    """The central 7/8 of float (N, 3, S, S), enlarged to S x S: a positive that suits digits and photographs."""
    size = images.shape[-1]
    margin = max(1, size // 16)
    centre = images[:, :, margin : size - margin, margin : size - margin]
    return F.interpolate(centre, size=(size, size), mode="bilinear", align_corners=False)


def evenly(count: int, at_most: int) -> NDArray[np.int64]:
    """At most so many of ``count`` places, evenly spaced."""
    chosen = min(count, at_most)
    return np.arange(chosen) * count // max(chosen, 1)


@contextmanager
def eval_mode(encoders: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the mode it had, also where they differed."""
    modes = [(module, module.training) for encoder in encoders for module in encoder.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _knn(
    bank: _Encoded, queries: _Encoded, config: EvaluateConfig, device: torch.device
) -> tuple[Score, Literal["train", "image"] | None]:
    """kNN accuracy of every representation on the queries; on what raw pixels were centred, if they are there."""
    num_classes = _num_classes(bank, queries)

    def hits_of(asked: Tensor, known: Tensor, *, centred: bool = True) -> Tensor:
        votes = knn_predict(
            asked.to(device), known.to(device), bank.labels.to(device),
            k=min(config.knn_k, len(known)), num_classes=num_classes, centred=centred,
        )  # fmt: skip
        return votes.cpu() == queries.labels

    hits = {name: hits_of(queries.features[name], bank.features[name]) for name in bank.features}
    if "raw_pixels" not in hits:
        return _accuracy("knn", hits), None
    pixels, known = (_less_own_mean(x.features["raw_pixels"]) for x in (queries, bank))
    alone = hits_of(pixels, known, centred=False)
    if alone.sum() <= hits["raw_pixels"].sum():
        return _accuracy("knn", hits), "train"
    return _accuracy("knn", {**hits, "raw_pixels": alone}), "image"


def _linear(bank: _Encoded, queries: _Encoded, config: EvaluateConfig, seed: int, device: torch.device) -> list[Score]:
    """Linear probe accuracy of every representation on the queries, and the penalties chosen."""
    num_classes = _num_classes(bank, queries)
    hits: dict[str, Tensor] = {}
    l2: dict[str, float] = {}
    for name in bank.features:
        probe = fit_linear_probe(
            bank.features[name].to(device),
            bank.labels.to(device),
            num_classes=num_classes,
            l2=config.probe_l2,
            holdout=config.probe_holdout,
            iterations=config.probe_iterations,
            seed=seed,
        )
        hits[name] = probe.predict(queries.features[name].to(device)).cpu() == queries.labels
        l2[name] = probe.l2
    return [_accuracy("linear", hits), Score(metric="linear_l2", **l2)]


def _num_classes(bank: _Encoded, queries: _Encoded) -> int:
    return int(torch.cat([bank.labels, queries.labels]).max()) + 1


def _less_own_mean(pixels: Tensor) -> Tensor:
    """(N, P) of any type -> float32 rows of mean 0: their cosine is the correlation of two images."""
    rows = pixels.float()
    return rows - rows.mean(dim=1, keepdim=True)


def _accuracy(metric: str, hits: dict[str, Tensor]) -> Score:
    """From representation -> (N,) mask of the queries that were right."""
    over = difference_interval(hits["encoder"], hits["raw_pixels"]) if "raw_pixels" in hits else None
    intervals = {name: accuracy_interval(right) for name, right in hits.items()}
    shares = {name: _share(right) for name, right in hits.items()}
    return Score(metric=metric, **shares, intervals=intervals, over_raw_pixels=over)


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)


def _diagnostics(images: _Encoded, positives: _Encoded, encoders: Iterable[str]) -> list[Score]:
    """Collapse diagnostics of the encoders; pixels don't collapse."""
    measured: dict[str, dict[str, float]] = {}
    for name in encoders:
        features = images.features[name]
        values = {
            "embedding_std": embedding_std(features),
            "rank_me": rank_me(features),
            "alignment": alignment(features, positives.features[name]),
            "uniformity": uniformity(features),
        }
        for metric, value in values.items():
            measured.setdefault(metric, {})[name] = float(value)
    return [Score(metric=metric, **values) for metric, values in measured.items()]


def _cell(score: Score, representation: str) -> str:
    value = getattr(score, representation)
    if value is None:
        return "-"
    if interval := score.intervals.get(representation):
        return f"{value:.1%} ±{50 * (interval[1] - interval[0]):.1f}"
    return f"{value:.0e}" if score.metric == "linear_l2" else f"{value:.3f}"


def _of_pixels(centred_on: Literal["train", "image"] | None) -> str:
    """The end of the sentence on kNN."""
    return {None: "", "train": ", of raw pixels too", "image": "; of raw pixels less each image's own mean"}[centred_on]
