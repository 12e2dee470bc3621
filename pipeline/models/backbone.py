"""Backbones are timm models without a classifier, so that an exported encoder loads with timm alone.

Small images need another first layer: at 32 px the stem of an ImageNet ResNet leaves 8 x 8 positions, and a ViT with
patches of 16 has 4 tokens. A ViT takes its patch size by ``args``; a ResNet's stem timm has no argument for, so
``stem: cifar`` replaces its two layers (SimCLR, arXiv:2002.05709, appendix B.9), and an exported encoder says so.
"""

import difflib
from typing import Any, Literal, Self

import timm
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from pipeline.section import Section


class BackboneConfig(Section):
    """Which timm architecture, with which stem, at which input size."""

    name: str = "resnet50"
    args: dict[str, Any] = Field(
        default_factory=dict
    )  # passed to timm.create_model, e.g. {channels: [32, 64, 128, 256]}
    stem: Literal["imagenet", "cifar"] = "imagenet"  # cifar: 3x3 convolution of stride 1, no max-pool (ResNets)
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

    @model_validator(mode="after")
    def _fits_the_architecture(self) -> Self:
        if self.stem == "cifar" and timm.model_entrypoint(self.name).__module__ != "timm.models.resnet":
            raise ValueError(
                f"stem=cifar replaces the first layers of a ResNet, and {self.name} has none of these; use stem=cifar "
                "with resnet18 or resnet50. A vision transformer sees small images by its patch size: stem=imagenet "
                "and args={img_size: 32, patch_size: 4} with image_size=32"
            )
        default = timm.get_pretrained_cfg(self.name)
        size = self.args.get("img_size", default.input_size[-1] if default else None)
        takes_any = default is None or not default.fixed_input_size or self.args.get("dynamic_img_size")
        if not takes_any and size not in (self.image_size, [self.image_size] * 2):
            raise ValueError(
                f"{self.name} takes images of {size} px, not of image_size={self.image_size}; "
                f"use args={{img_size: {self.image_size}}} (and a patch_size to match), or image_size={size}"
            )
        return self

    @property
    def has_patch_embed(self) -> bool:
        """Whether it starts with a patch embedding, as vision transformers do."""
        default = timm.get_pretrained_cfg(self.name)
        return default is not None and str(default.first_conv).startswith("patch_embed")


class Backbone(nn.Module):
    """A timm model that maps (B, 3, H, W) float to (B, D) pooled features."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = create_timm_model(config)
        # Some families (MobileNet, VGG) have a layer between the last features and the pooled output.
        self.feature_dim = int(getattr(self.net, "head_hidden_size", None) or self.net.num_features)  # type: ignore[arg-type] # ints

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)
        return features


def create_timm_model(config: BackboneConfig) -> nn.Module:
    """The bare timm model, randomly initialised, ``num_classes=0``; its state dict is what gets exported."""
    model: nn.Module = timm.create_model(config.name, pretrained=False, num_classes=0, **config.args)
    if config.stem == "cifar":
        replace_stem(model)
    return model


def replace_stem(model: nn.Module) -> None:
    """Give a timm ResNet the stem for small images, initialised as timm's other convolutions."""
    width: int = model.bn1.num_features  # type: ignore[assignment, union-attr] # every ResNet of timm has a bn1
    model.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")


def random_backbone(config: BackboneConfig, seed: int) -> Backbone:
    """A backbone whose weights depend on nothing but the config and the seed; global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(config)
