"""What the evaluation is configured by.

The final report has no kNN temperature to set: it is a constant of ``knn.py``, because accuracies taken at
different temperatures do not compare. Nor do those of the selection: a sweep fixes its k and temperature once.
"""

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.evaluate.knn import TEMPERATURE
from pipeline.section import Section


class SelectionConfig(Section):
    """Weighted kNN while training, on a split that neither trains nor is in the final report: what a sweep ranks by."""

    split: str = "selection"
    every_epochs: int = Field(default=1, ge=1)  # and after the last
    knn_k: int = Field(default=20, ge=1)
    knn_temperature: float = Field(default=TEMPERATURE, gt=0)
    bank_images: int = Field(default=50_000, ge=1)  # at most: labelled training images, evenly spaced

    @field_validator("split")
    @classmethod
    def _is_a_third(cls, split: str) -> str:
        if split in ("train", "validation"):
            kept_for = {"train": "is the bank of the kNN", "validation": "is kept for the final report"}[split]
            raise ValueError(
                f"the split {split!r} {kept_for}, and choosing by it would flatter; use a third: 'selection'"
            )
        return split

    @model_validator(mode="after")
    def _bank_holds_k(self) -> Self:
        if self.bank_images < self.knn_k:
            raise ValueError(f"bank_images={self.bank_images} hold no knn_k={self.knn_k} neighbours; use more images")
        return self


class EvaluateConfig(Section):
    """Weighted kNN and linear probe on frozen features; every representation compared gets the same treatment."""

    batch_size: int = Field(default=256, ge=1)  # images per forward pass
    # At most so many labelled train images, evenly spaced, are the bank and train the probe; None: all. A probe of
    # 1,000 classes takes 5 GB of device memory on 100,000 x 2,048 features, 60 GB on ImageNet's 1.28 million.
    train_images: int | None = Field(default=100_000, ge=2)
    knn_k: int = Field(default=20, ge=1)  # neighbours that vote; a smaller train split lowers it, with a note
    # Strengths tried for the penalty l2/2 * |W|^2 beside the mean cross-entropy; the one with the
    # lowest cross-entropy on the held-out part of the train split is kept. The validation split chooses nothing.
    probe_l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    probe_holdout: float = Field(default=0.2, gt=0, lt=1)  # share of the train split that chooses l2
    probe_iterations: int = Field(default=100, ge=1)  # at most, per strength
    selection: SelectionConfig | None = None  # a score while training; nothing in the final report depends on it

    def of_report(self) -> Self:
        """What the final report depends on."""
        return self.model_copy(update={"selection": None})

    @field_validator("probe_l2")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or any(not 0 < value < float("inf") for value in values):
            raise ValueError("probe_l2 needs one or more positive numbers, e.g. [0.0001, 0.001, 0.01]")
        return values
