"""Barlow Twins: the cross-correlation of two views' embeddings should be the identity (arXiv:2103.03230).

Loss = sum_i (1 - c_ii)^2 + lambda * sum_{i != j} c_ij^2, with c over the global batch. The release all-reduces c
without a gradient, so its gradient is W times too small, and what its learning rate of biases and its weight decay do
depends on W. Here the all-reduce has its gradient and they mean the same at any world size: the paper's run, on 32
GPUs, had ``optim.bias_lr`` = 0.0048 / 0.2 / 32 = 7.5e-4 and ``optim.weight_decay`` = 1e-6 x 32 = 3.2e-5.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone
from pipeline.models.heads import mlp


class BarlowConfig(MethodConfig):
    """The paper's values for ImageNet; its views are BYOL's."""

    name: Literal["barlow"] = "barlow"
    views: tuple[View, ...] = RECIPES["byol"]
    projection_dim: int = Field(default=8192, ge=2)  # the width of all three layers
    redundancy_weight: float = Field(default=0.0051, ge=0)  # lambda


@full_precision
def barlow_loss(z1: Tensor, z2: Tensor, redundancy_weight: float) -> Tensor:
    """(B, D), (B, D) of this rank, standardised over the global batch -> the loss of the global batch."""
    size = z1.shape[0] * distributed.world_size()
    c = distributed.all_reduce_sum_grad(z1.T @ z2) / size  # (D, D)
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + redundancy_weight * off_diagonal


class BarlowTwins(Method):
    """backbone -> projection -> BatchNorm without scale and shift -> cross-correlation."""

    Config = BarlowConfig

    def __init__(self, backbone: Backbone, config: BarlowConfig) -> None:
        super().__init__(backbone, config)
        self.redundancy_weight = config.redundancy_weight
        self.projection_head = mlp([backbone.feature_dim, *[config.projection_dim] * 3], last_bias=False)
        self.standardize = nn.BatchNorm1d(config.projection_dim, affine=False)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(z1, z2), each view encoded by itself, as published."""
        z1, z2 = (self.projection_head(self.backbone(view)) for view in views)
        return z1, z2

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-correlation of the standardised embeddings against the identity."""
        z1, z2 = (self.standardize(z) for z in embeddings)
        return barlow_loss(z1, z2, self.redundancy_weight), {}


METHOD = BarlowTwins
