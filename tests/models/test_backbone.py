"""Backbones: the stem for small images, and what does not fit together is said when the config is read."""

from typing import Any

import pytest
import torch

from pipeline.models.backbone import Backbone, BackboneConfig, create_timm_model, random_backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet10t"])
def test_the_cifar_stem_keeps_every_position_of_a_small_image(name: str) -> None:
    """SimCLR, appendix B.9: 32 px leave the stem as 32 x 32 positions, and the last stage as 4 x 4."""
    with torch.device("meta"):
        model = create_timm_model(BackboneConfig(name=name, stem="cifar", image_size=32))
        shapes = {}
        for stage in ("maxpool", "layer4"):
            model.get_submodule(stage).register_forward_hook(
                lambda _, __, out, stage=stage: shapes.update({stage: out.shape[2:]})
            )
        model(torch.empty(2, 3, 32, 32))
    assert shapes == {"maxpool": (32, 32), "layer4": (4, 4)}


def test_the_cifar_stem_is_initialised_as_the_other_convolutions_from_the_seed() -> None:
    first, again, other = (random_backbone(BackboneConfig(name="resnet18", stem="cifar"), seed) for seed in (0, 0, 1))
    weight = first.net.conv1.weight
    assert torch.equal(weight, again.net.conv1.weight)
    assert not torch.equal(weight, other.net.conv1.weight)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He, fan-out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "vit_small_patch16_224", "stem": "cifar"}, "vit_small_patch16_224 has none .* patch_size: 4"),
        ({"name": "vit_small_patch16_224", "image_size": 32}, r"of 224 px, not of image_size=32; .*img_size: 32"),
        ({"name": "vit_tiny_patch16_224", "args": {"img_size": 32}}, r"of 32 px, not of image_size=224; .*224"),
    ],
)
def test_what_does_not_fit_is_said_with_what_does(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BackboneConfig.model_validate(values)


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_small_patch16_224", "mobilenetv3_large_100", "vgg11_bn", "hgnetv2_b0"]
)
def test_feature_dim_is_the_width_of_the_output(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(name=name)).eval()
        assert backbone(torch.empty(1, 3, 224, 224)).shape == (1, backbone.feature_dim)
