"""What a config says of its model and method is tried on the meta device, before anything is started."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pipeline.config import ConfigError, load_config, override
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.preflight import check_batch, check_method
from tests.methods.invariance import CONFIGS

VIT = ["model={name: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8, depth: 1}, image_size: 32}"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_passes(path: Path) -> None:
    check_method(load_config(path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.args={foo: 1}"], ["model.name=resnet10t with model.args={'foo': 1}", "'foo'", "stem_width", "ResNet"]),
        (["model.args={in_chans: 1}"], ["does not take images of 32 px", "3 channels", "model.args"]),
        (["model.args={global_pool: ''}"], ["shape (2, 512, 1, 1)", "(2, 512)", "e.g. resnet50"]),
        (
            [*VIT, "method={name: moco_v2, views: [{}, {size: 24}]}"],
            ["images of 24 px", "(24) doesn't match model (32)"],
        ),
        (["optim.constant_lr=[predicter]"], ["'predicter'", "backbone, projection_head"]),
        (
            ["method={name: byol, views: simclr}", "optim.constant_lr=[momentum_head]"],
            ["'momentum_head'", "are trained are backbone, projection_head, predictor"],
        ),
        (["model.args={checkpoint_path: /nope}"], ["checkpoint_path", "cannot be built: FileNotFoundError;"]),
        (["method.projection_dim=1000000000000000000"], ["method.projection_dim=1000000000000000000", "smaller"]),
        (
            ["method={name: moco_v2, queue_size: 100000000000000000000}"],
            ["method.queue_size=100000000000000000000", "smaller"],
        ),
        (["train.micro_batches=2"], ["micro_batches=2", "BatchNorm", "projection_bn=false"]),
        ([*VIT, "train.micro_batches=2"], ["micro_batches=2", "2 BatchNorm", "projection_head"]),
    ],
)
def test_a_mistake_is_named_with_what_would_work(overrides: list[str], words: list[str]) -> None:
    config = load_config("configs/quickstart.yaml", overrides)
    with pytest.raises(UserError) as caught:
        check_method(config)
    for word in words:
        assert word in str(caught.value)


def test_what_the_messages_recommend_works() -> None:
    vit = load_config("configs/quickstart.yaml", [*VIT, "train.micro_batches=2", "method.projection_bn=false"])
    check_method(vit)
    check_method(override(vit, ["method={name: moco_v2, views: simclr}"]))
    check_method(load_config("configs/quickstart.yaml", ["method={name: moco_v2, views: [{}, {size: 24}]}"]))
    check_method(
        load_config(
            "configs/quickstart.yaml", ["method={name: simsiam, views: simclr}", "optim.constant_lr=[predictor]"]
        )
    )


def test_an_architecture_that_cannot_be_built_without_values_is_tried_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    build = timm.create_model

    def reads_a_value(*args: Any, **kwargs: Any) -> nn.Module:
        assert torch.ones(1).item() == 1  # as drop-path rates from torch.linspace: an error on the meta device
        return build(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", reads_a_value)
    check_method(load_config("configs/quickstart.yaml", ["model.args={channels: [4, 4, 4, 8]}"]))


def test_a_warmup_that_is_rounded_to_the_whole_run_is_refused(tmp_path: Path) -> None:
    config = load_config("configs/quickstart.yaml", ["train.global_batch_size=4", "train.epochs=3"])
    manifest = write_shards((Sample(str(i), b"an image", "jpg", "train") for i in range(8)), str(tmp_path))
    check_batch(override(config, ["optim.warmup_epochs=2.7"]), manifest)
    with pytest.raises(ConfigError, match=r"warmup_epochs=2\.9 is rounded to all 6 steps.*at most .*warmup_epochs=2"):
        check_batch(override(config, ["optim.warmup_epochs=2.9"]), manifest)
