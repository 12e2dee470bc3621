"""What the evaluation is configured by.

The kNN temperature is missing on purpose: it is a constant of ``knn.py``, because accuracies taken at
different temperatures do not compare.
"""

from pydantic import BaseModel, ConfigDict, Field, field_validator


class EvaluateConfig(BaseModel):
    """Weighted kNN and linear probe on frozen features; every representation compared gets the same treatment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(default=256, ge=1)  # images per forward pass
    knn_k: int = Field(default=20, ge=1)  # neighbours that vote; a smaller train split lowers it, with a note
    # Strengths tried for the penalty l2/2 * |W|^2 beside the mean cross-entropy; the one with the
    # lowest cross-entropy on the held-out part of the train split is kept. The validation split chooses nothing.
    probe_l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    probe_holdout: float = Field(default=0.2, gt=0, lt=1)  # share of the train split that chooses l2
    probe_iterations: int = Field(default=100, ge=1)  # at most, per strength

    @field_validator("probe_l2")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or any(not 0 < value < float("inf") for value in values):
            raise ValueError("probe_l2 needs one or more positive numbers, e.g. [0.0001, 0.001, 0.01]")
        return values
