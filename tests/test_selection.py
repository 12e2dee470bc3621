"""The score while training: right, the same at any world size, and without a trace in the run it watches."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.checkpoint import CheckpointStore
from pipeline.config import Config, ConfigError, load_config, override
from pipeline.data.assemble import BadSamplesError
from pipeline.data.loader import normalize, read_images
from pipeline.data.manifest import Manifest
from pipeline.data.writer import Sample, write_shards
from pipeline.evaluate.report import NonFiniteFeaturesError, eval_mode
from pipeline.methods.base import Method
from pipeline.models.backbone import Backbone
from pipeline.preflight import prepare_data
from pipeline.progress import Progress
from pipeline.selection import METRIC, Selection, read_scores
from pipeline.storage import StorageError
from pipeline.train import build_method
from tests import gloo
from tests.data.images import photos, write_digits
from tests.fits import run

TRAIN, SELECTION, BANK = 240, 100, 150
STEPS = 3  # per epoch
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two epochs of three steps on a few real digits."""
    folder = tmp_path_factory.mktemp("selection")
    write_digits(f"{folder}/shards", {"train": TRAIN, "validation": 1, "selection": SELECTION})
    return load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"data.shards={folder}/shards",
            "data.source=null",
            f"evaluate.selection={{bank_images: {BANK}}}",
            "evaluate.batch_size=64",
            "model.args={channels: [4, 8, 8, 16]}",
            f"train.global_batch_size={TRAIN // STEPS}",
            "train.epochs=2",
            "optim.warmup_epochs=0.5",
            "train.checkpoint_every_steps=1",
            "train.log_every_steps=2",
        ],
    )


@pytest.fixture(scope="module")
def watched(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Method, list[Progress], str]:
    url = str(tmp_path_factory.mktemp("watched"))
    method, reports = run(config, url)
    assert method is not None
    return method, reports, url


def test_the_run_is_bit_for_bit_the_one_that_nobody_watches(
    config: Config, watched: tuple[Method, list[Progress], str], tmp_path: Path
) -> None:
    method, reports, _ = watched
    alone, unscored = run(override(config, ["evaluate.selection=null"]), str(tmp_path))
    assert alone is not None
    for name, value in alone.state_dict().items():
        assert torch.equal(value, method.state_dict()[name]), name
    assert all(module.training for module in method.modules())
    assert [r.step for r in unscored] == [2, 4, 6]
    assert [(r.step, METRIC in r.metrics) for r in reports] == [(2, False), (3, True), (4, False), (6, True)]
    assert [r.metrics["loss"] for r in reports if r.step != 3] == [r.metrics["loss"] for r in unscored]
    assert reports[-1].logged["train/selection/knn"] == reports[-1].metrics[METRIC]


def peer(config: Config, backbone: Backbone) -> float:
    """The score by scikit-learn, on images and labels read another way."""
    manifest = Manifest.load(config.shards_url)
    features, labels = {}, {}
    for split in ("train", "selection"):
        _, images, numbers = next(read_images(manifest, split, 32, batch_size=5000))
        with eval_mode([backbone]), torch.no_grad():
            inputs = normalize(images, config.data.mean, config.data.std)
            features[split], labels[split] = backbone(inputs).numpy(), numbers.numpy()
    every = [i * len(labels["train"]) // BANK for i in range(BANK)]
    centre = features["train"][every].mean(axis=0, dtype=np.float64)
    knn = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(features["train"][every] - centre, labels["train"][every])
    return float(knn.score(features["selection"] - centre, labels["selection"]))


def test_the_score_is_that_of_scikit_learn_and_is_kept(
    config: Config, watched: tuple[Method, list[Progress], str]
) -> None:
    """Of a wide encoder as it was initialised, and of the narrow one that was trained."""
    method, reports, url = watched
    wide = override(config, ["model.args={channels: [32, 64, 128, 256]}"])
    untrained, trained = peer(config, build_method(wide).backbone), peer(config, method.backbone)
    assert untrained > 0.2, "twice chance, so the labels are those of the images"
    a_tie = 1.5 / SELECTION
    assert score(wide) == pytest.approx(untrained, abs=a_tie)
    assert reports[-1].metrics[METRIC] == pytest.approx(trained, abs=a_tie)
    scored = [(r.step, r.step // STEPS, r.metrics[METRIC], r.metrics["loss"]) for r in reports if METRIC in r.metrics]
    assert [(s.step, s.epochs, s.knn, s.loss) for s in read_scores(CheckpointStore(url, "run"))] == scored


def score(config: Config, *, poison: bool = False) -> float:
    """Of the untrained encoder, in this process or rank."""
    backbone = build_method(config).backbone
    if poison:
        next(backbone.parameters()).data.fill_(float("nan"))
    manifest = Manifest.load(config.shards_url)
    return (
        Selection(config, manifest, STEPS, CheckpointStore("memory://nowhere", "run"))
        .after(STEPS, backbone, CPU)[METRIC]
        .item()
    )


def test_the_score_of_given_weights_is_the_same_at_any_world_size(config: Config) -> None:
    """With 50 images in passes of 64, one rank of two encodes nothing of the bank.

    All ranks have one thread: how many move the features by 4e-7, and an untrained encoder's neighbours nearly tie.
    """
    for change in ([], ["evaluate.selection.bank_images=50"], ["evaluate.batch_size=7"]):
        changed = override(config, change)
        assert gloo.run(2, score, changed) == gloo.run(1, score, changed) * 2, change


def fit_in_float64(config: Config, store_url: str) -> list[tuple[int, float]]:
    torch.set_default_dtype(torch.float64)
    try:
        _, reports = run(config, store_url)
    finally:
        torch.set_default_dtype(torch.float32)
    return [(r.step, r.metrics[METRIC]) for r in reports if METRIC in r.metrics]


def test_a_run_on_two_ranks_has_the_scores_of_a_run_on_one(config: Config, tmp_path: Path) -> None:
    short = override(config, ["train.epochs=1"])
    ranks = gloo.run(2, fit_in_float64, short, str(tmp_path / "ranks"))
    assert ranks == [fit_in_float64(short, str(tmp_path / "alone")), []], "rank 0 alone reports"


def test_a_resumed_run_scores_what_was_cut_and_nothing_twice(
    config: Config, watched: tuple[Method, list[Progress], str], tmp_path: Path
) -> None:
    _, undisturbed, url = watched
    expected = {r.step: r.metrics for r in undisturbed}
    _, first = run(config, str(tmp_path), until=3)  # before the checkpoint of step 3
    assert [r.step for r in first] == [2, 3]
    _, second = run(config, str(tmp_path), until=4)
    assert [(r.step, r.metrics.get(METRIC)) for r in second] == [
        (3, expected[3][METRIC]),
        (4, None),
    ]
    _, third = run(config, str(tmp_path))
    assert [r.step for r in third] == [4, 6]
    assert third[-1].metrics == expected[6]
    assert read_scores(CheckpointStore(str(tmp_path), "run")) == read_scores(CheckpointStore(url, "run"))
    assert run(config, str(tmp_path))[1] == [], "a finished run scores nothing"

    for damaged in ("[{", '[{"step": 3}]', "3"):
        (tmp_path / "selection.json").write_text(damaged)
        with pytest.raises(StorageError, match=r"selection\.json is damaged .*; restore it, or delete it"):
            read_scores(CheckpointStore(str(tmp_path), "run"))


def test_every_so_many_epochs_and_after_the_last(config: Config) -> None:
    sparse = override(config, ["evaluate.selection.every_epochs=2", "train.epochs=5"])
    backbone = build_method(sparse).backbone
    selection = Selection(sparse, Manifest.load(sparse.shards_url), STEPS, CheckpointStore("memory://nowhere", "run"))
    assert [step for step in range(1, 5 * STEPS + 1) if selection.after(step, backbone, CPU)] == [6, 12, 15]


def test_features_that_are_no_numbers_end_the_run(config: Config) -> None:
    with pytest.raises(NonFiniteFeaturesError, match=r"not finite.*optim\.lr"):
        score(config, poison=True)


def on_photos(samples: list[Sample], folder: Path, *overrides: str) -> Config:
    write_shards(samples, str(folder), class_names=("even", "odd"))
    return load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"data.shards={folder}",
            "data.source=null",
            "train.global_batch_size=8",
            "evaluate.selection={knn_k: 3}",
            *overrides,
        ],
    )


def test_images_that_are_none_are_left_out_up_to_a_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = photos(30) + photos(10, split="selection")
    samples[3], samples[35] = replace(samples[3], image=b"no"), replace(samples[35], image=b"nor this")
    config = on_photos(samples, tmp_path, "data.max_bad_share=0.05")
    with caplog.at_level(logging.WARNING):
        assert 0 <= score(config) <= 1
    assert "2 images that evaluate.selection reads cannot be decoded" in caplog.text
    assert "35 in selection-000000.tar" in caplog.text
    with pytest.raises(BadSamplesError, match=r"2 of the 40 images .* data\.max_bad_share=0\.04 allows"):
        score(override(config, ["data.max_bad_share=0.04"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["evaluate.selection.split=probe"],
            ["split=probe", "train, validation, selection", "data.hold_out={probe: 0.1}", "--hold-out probe=0.1"],
        ),
        (["evaluate.selection={knn_k: 300, bank_images: 300}"], ["knn_k=300", "knn_k <= 240"]),
    ],
)
def test_a_selection_that_cannot_be_scored_is_refused(config: Config, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_data(override(config, overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (lambda s: -1 if s.split == "selection" else s.label, "the split 'selection' of .* has none"),
        (lambda s: -1 if s.split == "train" else s.label, "the split 'train' of .* has none"),
        (lambda s: 1, "are 1, .* two classes"),
    ],
    ids=["selection unlabelled", "train unlabelled", "one class"],
)
def test_labels_that_say_nothing_are_refused(tmp_path: Path, labels: object, words: str) -> None:
    assert callable(labels)
    samples = [replace(s, label=labels(s)) for s in photos(10) + photos(4, split="selection")]
    with pytest.raises(ConfigError, match=words):
        prepare_data(on_photos(samples, tmp_path))


def test_the_split_is_cut_as_the_shards_are_written_and_not_later(tmp_path: Path) -> None:
    config = load_config("configs/quickstart.yaml", [f"storage.url={tmp_path}", "data.hold_out={selection: 0.2}"])
    manifest = prepare_data(override(config, ["evaluate.selection={}"]))
    assert manifest.splits == ("train", "validation", "selection")
    with pytest.raises(ConfigError, match=r"hold_out names 'probe'.*already have the splits train, validation"):
        prepare_data(override(config, ["data.hold_out={probe: 0.1}", f"data.shards={manifest.url}"]))
