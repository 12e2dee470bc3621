"""VICReg: invariance, a floor under each dimension's variance, decorrelated dimensions (arXiv:2105.04906).

Loss = 25 * mean squared difference + 25 * variance term + 1 * covariance term, as released: the variance term is
HALVED per branch and so sums to the mean of both (one peer drops the half), the covariance term sums both branches.
Mean and covariance are those of the global batch, one all-reduce each; the release gathers embeddings instead.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone
from pipeline.models.heads import mlp


class VICRegConfig(MethodConfig):
    """The paper's values for ImageNet; its views are BYOL's."""

    name: Literal["vicreg"] = "vicreg"
    views: tuple[View, ...] = RECIPES["byol"]
    projection_dim: int = Field(default=8192, ge=2)  # the width of all three layers
    invariance_weight: float = Field(default=25.0, ge=0)
    variance_weight: float = Field(default=25.0, ge=0)
    covariance_weight: float = Field(default=1.0, ge=0)


@full_precision
def vicreg_loss(
    z1: Tensor, z2: Tensor, invariance_weight: float, variance_weight: float, covariance_weight: float
) -> Tensor:
    """(B, D), (B, D) of this rank -> scalar; its mean over ranks is the loss of the global batch."""
    size, dim = z1.shape[0] * distributed.world_size(), z1.shape[1]
    both = torch.stack([z1, z2])  # (2, B, D)
    centred = both - distributed.all_reduce_sum_grad(both.sum(1, keepdim=True)) / size
    covariance = distributed.all_reduce_sum_grad(centred.mT @ centred) / (size - 1)  # (2, D, D)
    variance = covariance.diagonal(dim1=1, dim2=2)  # (2, D)
    floor = F.relu(1 - torch.sqrt(variance + 1e-4)).mean()  # halved per branch = the mean over both
    off_diagonal = (covariance.square().sum() - variance.square().sum()) / dim
    invariance = F.mse_loss(z1, z2)  # of this rank's samples
    return invariance_weight * invariance + variance_weight * floor + covariance_weight * off_diagonal


class VICReg(Method):
    """backbone -> expander -> three terms."""

    Config = VICRegConfig

    def __init__(self, backbone: Backbone, config: VICRegConfig) -> None:
        super().__init__(backbone, config)
        self.weights = config.invariance_weight, config.variance_weight, config.covariance_weight
        self.projection_head = mlp([backbone.feature_dim, *[config.projection_dim] * 3], last_bias=False)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(z1, z2), each view encoded by itself, as published."""
        z1, z2 = (self.projection_head(self.backbone(view)) for view in views)
        return z1, z2

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the three terms."""
        z1, z2 = embeddings
        return vicreg_loss(z1, z2, *self.weights), {}


METHOD = VICReg
