"""Backbones are timm models without a classifier, so that an exported encoder loads with timm alone."""

import difflib
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn


class BackboneConfig(BaseModel):
    """Which timm architecture, at which input size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "resnet50"
    args: dict[str, Any] = Field(
        default_factory=dict
    )  # passed to timm.create_model, e.g. {channels: [32, 64, 128, 256]}
    image_size: int = Field(default=224, ge=8, le=1024)

    @field_validator("name")
    @classmethod
    def _is_a_timm_model(cls, name: str) -> str:
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=8, cutoff=0.7) or [
                "resnet50",
                "vit_small_patch16_224",
            ]
            raise ValueError(f"timm has no model {name!r}; close names: {', '.join(close)}")
        return name


class Backbone(nn.Module):
    """A timm model that maps (B, 3, H, W) float to (B, D) pooled features."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = create_timm_model(config)
        self.feature_dim = int(self.net.num_features)  # type: ignore[arg-type] # an int attribute of every timm model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)
        return features


def create_timm_model(config: BackboneConfig) -> nn.Module:
    """The bare timm model, randomly initialised, ``num_classes=0``; its state dict is what gets exported."""
    model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **config.args)
    return model


def random_backbone(config: BackboneConfig, seed: int) -> Backbone:
    """A backbone whose weights depend on nothing but the config and the seed; global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(config)
