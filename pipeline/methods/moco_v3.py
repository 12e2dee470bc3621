"""MoCo v3: both directions against the keys of the global batch, no queue, a predictor (arXiv:2104.02057).

Loss = 2T * cross-entropy per direction, the SUM of both; keys carry no gradient. The last BatchNorm of the heads has
neither scale nor shift. For ResNets (the defaults here) the projection head has 2 layers and the predictor ends
without BatchNorm; for ViT 3 layers, a predictor that ends with one, temperature 0.2, a frozen patch embedding, and
crops from 0.08 of the area on instead of 0.2 (``views: byol``).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.infonce import log_sum_exp_similarity
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.models.heads import mlp
from pipeline.models.momentum import momentum_copy


class MoCoV3Config(MethodConfig):
    """The release's values for ResNet-50, 100 epochs; 0.996 is the decay for 1000. Its ViTs have BYOL's views."""

    name: Literal["moco_v3"] = "moco_v3"
    views: tuple[View, ...] = RECIPES["moco-v3"]
    temperature: float = Field(default=1.0, gt=0)
    projection_dim: int = Field(default=256, ge=1)
    hidden_dim: int = Field(default=4096, ge=1)  # of both heads
    projection_layers: int = Field(default=2, ge=1)  # ViT: 3
    predictor_bn: bool = False  # BatchNorm after the predictor's last layer; ViT: true
    freeze_patch_embed: bool = False  # ViT: true; the paper's remedy for instability
    ema_decay: float = Field(default=0.99, ge=0, le=1)
    ema_decay_end: float = Field(default=1.0, ge=0, le=1)

    def check(self, model: BackboneConfig) -> None:
        """Only a ViT has a patch embedding to freeze."""
        super().check(model)
        if self.freeze_patch_embed and not model.has_patch_embed:
            raise ValueError(
                f"method.freeze_patch_embed=true needs a vision transformer, and {model.name} has no patch "
                "embedding; use model.name=vit_small_patch16_224 or method.freeze_patch_embed=false"
            )


@full_precision
def moco_v3_loss(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """(B, D), (B, D) of any length -> 2T * the mean cross-entropy of each query against all ranks' keys."""
    query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
    own = (query * key).sum(1) / temperature
    candidates = log_sum_exp_similarity(query, distributed.all_gather(key), temperature)
    return 2 * temperature * (candidates - own).mean()


class MoCoV3(Method):
    """online: backbone -> projection -> prediction; keys: momentum copies of the first two."""

    Config = MoCoV3Config

    def __init__(self, backbone: Backbone, config: MoCoV3Config) -> None:
        super().__init__(backbone, config)
        self.temperature = config.temperature
        if config.freeze_patch_embed:
            backbone.net.patch_embed.requires_grad_(False)
        width, hidden, out = backbone.feature_dim, config.hidden_dim, config.projection_dim
        self.projection_head = mlp([width, *[hidden] * (config.projection_layers - 1), out], last_bn="plain")
        last_bn: Literal["plain", "none"] = "plain" if config.predictor_bn else "none"
        self.predictor = mlp([out, hidden, out], last_bn=last_bn, last_bias=False)
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_head = momentum_copy(self.projection_head)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(q1, q2, k1, k2): each view gives a query and a key."""
        q1, q2 = (self.predictor(self.projection_head(self.backbone(view))) for view in views)
        with torch.no_grad():
            k1, k2 = (self.momentum_head(self.momentum_backbone(view)) for view in views)
        return q1, q2, k1, k2

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both directions, and their share of what guessing among the global batch would cost."""
        q1, q2, k1, k2 = embeddings
        loss = moco_v3_loss(q1, k2, self.temperature) + moco_v3_loss(q2, k1, self.temperature)
        chance = 4 * self.temperature * math.log(len(q1) * distributed.world_size())
        return loss, {"loss_vs_chance": loss.detach() / chance}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum)."""
        return [(self.backbone, self.momentum_backbone), (self.projection_head, self.momentum_head)]


METHOD = MoCoV3
