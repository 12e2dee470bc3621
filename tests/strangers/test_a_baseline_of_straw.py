"""The baseline is the strongest that can be had for nothing: digits drawn in ink on paper, where nearly all is white.

There, plain cosine tells raw pixels apart by little but their paper, and any encoder looks good beside them.
"""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.data.loader import read_images
from pipeline.data.manifest import Manifest
from pipeline.data.writer import Sample
from pipeline.evaluate.config import EvaluateConfig
from pipeline.evaluate.report import EvaluationReport, evaluate_encoder
from pipeline.model_card import Score, render
from tests.encoders import CARD
from tests.evaluate.test_report import shards, tiny_backbone

K, TEMPERATURE = 20, 0.07


def drawn_in_ink(sample: Sample) -> Sample:
    """White paper of changing brightness, ink of changing strength; decided by the sample's key."""
    digit = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_GRAYSCALE).astype(np.float64)
    generator = np.random.default_rng(int(sample.key))
    paper, ink = generator.uniform(200, 255), generator.uniform(0.2, 0.7)
    drawing = np.clip(paper - ink * digit, 0, 255).round().astype(np.uint8)
    return replace(sample, image=cv2.imencode(".png", drawing)[1].tobytes())


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return shards(tmp_path_factory.mktemp("drawings"), drawn_in_ink)


@pytest.fixture(scope="module")
def report(drawings: Manifest) -> EvaluationReport:
    return evaluate_encoder(
        tiny_backbone(seed=7), drawings,
        config=EvaluateConfig(), mean=(0.5,) * 3, std=(0.25,) * 3, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def cosine_knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """scikit-learn's accuracy, in float64."""
    model = KNeighborsClassifier(
        n_neighbors=K, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
    )
    return float(model.fit(bank, labels).score(queries, truth))


def test_raw_pixels_get_the_better_centring(drawings: Manifest, report: EvaluationReport) -> None:
    _, bank, labels = next(read_images(drawings, "train", 32, batch_size=1000))
    _, queries, truth = next(read_images(drawings, "validation", 32, batch_size=1000))
    known, asked = (x.double().flatten(1).numpy() for x in (bank, queries))
    own = [x - x.mean(axis=1, keepdims=True) for x in (known, asked)]
    plain = cosine_knn(known, labels.numpy(), asked, truth.numpy())
    on_train = cosine_knn(known - known.mean(axis=0), labels.numpy(), asked - known.mean(axis=0), truth.numpy())
    on_image = cosine_knn(own[0], labels.numpy(), own[1], truth.numpy())
    assert on_image > max(plain, on_train) + 0.05, "the case that this is about"
    assert report.metrics()["knn/raw_pixels"] == on_image
    assert report.pixels_centred_on == "image"
    assert "of raw pixels less each image's own mean" in report.table()


def test_what_does_not_beat_raw_pixels_says_so_in_the_report_and_the_card(report: EvaluationReport) -> None:
    """An encoder that was never trained."""
    assert [doubt.partition(":")[0] for doubt in report.doubts()] == ["knn", "linear"]
    for doubt in report.doubts():
        assert f"note: {doubt}" in report.table()
        assert doubt in card(report.scores)


@pytest.mark.parametrize(
    ("over", "doubted"), [((-0.01, 0.02), True), ((0.0, 0.03), True), ((0.001, 0.04), False), (None, False)]
)
def test_only_what_may_be_chance_is_doubted(over: tuple[float, float] | None, doubted: bool) -> None:
    score = Score(metric="knn", encoder=0.60, raw_pixels=0.59, over_raw_pixels=over)
    assert bool(score.doubt()) == doubted
    assert ("Not better than raw pixels?" in card((score,))) == doubted


def card(scores: tuple[Score, ...]) -> str:
    """The model card with these scores."""
    return render(
        CARD.model_copy(update={"metrics": scores}),
        architecture="resnet18", stem_width=None, feature_dim=64, parameters=1, image_size=32, resized_side=32,
        mean=(0.5,) * 3, std=(0.25,) * 3, golden_sha256="0" * 64, tolerance=1e-4,
    )  # fmt: skip
