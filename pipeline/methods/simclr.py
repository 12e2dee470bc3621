"""SimCLR: two views of an image attract, all others in the global batch repel (Chen et al. 2020, arXiv:2002.05709).

Non-obvious: the head's last BatchNorm has a scale but no shift, and what is evaluated is the backbone, not the head.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.ntxent import ntxent
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.models.heads import mlp


class SimCLRConfig(MethodConfig):
    """The paper's values for ImageNet."""

    name: Literal["simclr"] = "simclr"
    views: tuple[View, ...] = RECIPES["simclr"]
    temperature: float = Field(default=0.1, gt=0)
    positive_prior: float = Field(default=0.0, ge=0, lt=1)  # tau+ of the debiased loss (Chuang et al. 2020)
    hardness: float = Field(default=0.0, ge=0)  # beta of hard negatives (Robinson et al. 2021), as a share of 1/T
    projection_layers: int = Field(default=2, ge=1)  # 3 in SimCLR v2
    projection_dim: int = Field(default=128, ge=1)
    projection_bn: bool = True  # False: a head without BatchNorm, for train.micro_batches with a ViT
    projection_hidden_dim: int | None = Field(default=None, ge=1)  # None = the backbone's feature width

    def check(self, model: BackboneConfig) -> None:
        """Two views of one size, as one pass takes both."""
        super().check(model)
        if len(sizes := {view.size or model.image_size for view in self.views}) > 1:
            raise ValueError(
                f"method.views are of {' and '.join(map(str, sorted(sizes)))} px, and simclr embeds both in one pass; "
                "give them one size, or use a method that embeds each by itself, e.g. method.name=moco_v2 or byol"
            )


class SimCLR(Method):
    """backbone -> projection head -> NT-Xent."""

    Config = SimCLRConfig

    def __init__(self, backbone: Backbone, config: SimCLRConfig) -> None:
        super().__init__(backbone, config)
        self.temperature = config.temperature
        self.positive_prior, self.hardness = config.positive_prior, config.hardness
        hidden = config.projection_hidden_dim or backbone.feature_dim
        widths = [backbone.feature_dim, *[hidden] * (config.projection_layers - 1), config.projection_dim]
        self.projection_head = mlp(
            widths, hidden_bn=config.projection_bn, last_bn="scale" if config.projection_bn else "none"
        )

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(z1, z2), in one pass so that both views share their BatchNorm statistics, as published."""
        return self.projection_head(self.backbone(torch.cat(views))).chunk(2)

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent, and its share of what guessing among the 2N - 1 others would cost."""
        z1, z2 = embeddings
        loss = ntxent(z1, z2, self.temperature, positive_prior=self.positive_prior, hardness=self.hardness)
        return loss, {"loss_vs_chance": loss.detach() / math.log(2 * len(z1) * distributed.world_size() - 1)}


METHOD = SimCLR
