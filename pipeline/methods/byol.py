"""BYOL: predict the momentum encoder's projection of the other view, without negatives (arXiv:2006.07733).

The loss is the SUM over both directions of 2 - 2 cos, the mean over the batch (averaging the two directions instead
halves the gradient). The decay rises from ``ema_decay`` to 1 with a cosine, after the optimizer's step, parameters
only: the target's BatchNorm statistics are its own.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.data.views import RECIPES, View
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone
from pipeline.models.heads import mlp
from pipeline.models.momentum import momentum_copy


class BYOLConfig(MethodConfig):
    """The paper's values for 1000 epochs of ImageNet; its 300 and 100 epochs start at a decay of 0.99."""

    name: Literal["byol"] = "byol"
    views: tuple[View, ...] = RECIPES["byol"]
    projection_dim: int = Field(default=256, ge=1)
    hidden_dim: int = Field(default=4096, ge=1)  # of the projection and of the prediction head
    ema_decay: float = Field(default=0.996, ge=0, le=1)
    ema_decay_end: float = Field(default=1.0, ge=0, le=1)


@full_precision
def byol_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """(B, D), (B, D) -> mean of 2 - 2 cos; no gradient to the target. Equation 2 of the paper."""
    return (2 - 2 * F.cosine_similarity(prediction, target.detach(), dim=1)).mean()


class BYOL(Method):
    """online: backbone -> projection -> prediction; target: momentum copies of the first two."""

    Config = BYOLConfig

    def __init__(self, backbone: Backbone, config: BYOLConfig) -> None:
        super().__init__(backbone, config)
        self.projection_head = mlp([backbone.feature_dim, config.hidden_dim, config.projection_dim], last_bias=False)
        self.predictor = mlp([config.projection_dim, config.hidden_dim, config.projection_dim], last_bias=False)
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_head = momentum_copy(self.projection_head)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(p1, p2, t1, t2): predictions and targets, each view encoded by itself, as published."""
        p1, p2 = (self.predictor(self.projection_head(self.backbone(view))) for view in views)
        with torch.no_grad():
            t1, t2 = (self.momentum_head(self.momentum_backbone(view)) for view in views)
        return p1, p2, t1, t2

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each view's prediction against the other view's target."""
        p1, p2, t1, t2 = embeddings
        return byol_loss(p1, t2) + byol_loss(p2, t1), {}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum)."""
        return [(self.backbone, self.momentum_backbone), (self.projection_head, self.momentum_head)]


METHOD = BYOL
