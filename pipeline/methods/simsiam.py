"""SimSiam: predict the other view's projection behind a stop-gradient, no momentum encoder (arXiv:2011.10566).

Loss = -(cos(p1, z2) + cos(p2, z1)) / 2. The projection's last BatchNorm has neither scale nor shift, and the
predictor's learning rate stays constant: ``optim.constant_lr: [predictor]``.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.data.views import RECIPES, View
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone
from pipeline.models.heads import mlp


class SimSiamConfig(MethodConfig):
    """The paper's values for ImageNet; its views are MoCo v2's."""

    name: Literal["simsiam"] = "simsiam"
    views: tuple[View, ...] = RECIPES["moco-v2"]
    projection_dim: int = Field(default=2048, ge=1)  # 3 layers of this width; 2 of them suffice for CIFAR
    projection_layers: int = Field(default=3, ge=1)
    predictor_hidden_dim: int = Field(default=512, ge=1)


@full_precision
def simsiam_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """(B, D), (B, D) -> the mean of -cos; no gradient to the projection."""
    return -F.cosine_similarity(prediction, projection.detach(), dim=1).mean()


class SimSiam(Method):
    """backbone -> projection -> prediction, of both views."""

    Config = SimSiamConfig

    def __init__(self, backbone: Backbone, config: SimSiamConfig) -> None:
        super().__init__(backbone, config)
        dim = config.projection_dim
        self.projection_head = mlp([backbone.feature_dim, *[dim] * config.projection_layers], last_bn="plain")
        self.predictor = mlp([dim, config.predictor_hidden_dim, dim])

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(z1, z2, p1, p2): projections and predictions, each view encoded by itself, as published."""
        z1, z2 = (self.projection_head(self.backbone(view)) for view in views)
        return z1, z2, self.predictor(z1), self.predictor(z2)

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each view's prediction against the other view's projection."""
        z1, z2, p1, p2 = embeddings
        return (simsiam_loss(p1, z2) + simsiam_loss(p2, z1)) / 2, {}


METHOD = SimSiam
