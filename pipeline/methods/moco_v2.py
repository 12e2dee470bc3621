"""MoCo v2: v1 with SimCLR's MLP head, blur and a cosine schedule, temperature 0.2 (Chen et al. 2020, arXiv:2003.04297).

Everything else is v1's, its deviations included. The head has no BatchNorm.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from pipeline.data.views import RECIPES, View
from pipeline.methods.base import MethodConfig
from pipeline.methods.moco_v1 import MoCoV1, MoCoV1Config
from pipeline.models.heads import mlp


class MoCoV2Config(MoCoV1Config):
    """The paper's values for ImageNet."""

    name: Literal["moco_v2"] = "moco_v2"  # type: ignore[assignment]
    views: tuple[View, ...] = RECIPES["moco-v2"]
    temperature: float = Field(default=0.2, gt=0)


class MoCoV2(MoCoV1):
    """MoCo with a two-layer head."""

    Config: ClassVar[type[MethodConfig]] = MoCoV2Config

    def build_head(self, feature_dim: int, projection_dim: int) -> nn.Module:
        """features -> hidden layer of the same width -> (B, projection_dim)."""
        return mlp([feature_dim, feature_dim, projection_dim], hidden_bn=False)


METHOD = MoCoV2
