"""Several passes give the gradient of one, for losses that compare samples too; BatchNorm and dropout are refused."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.accumulation import AccumulationError, backward_in_parts, check_accumulation
from pipeline.methods.base import Method, method_class
from pipeline.models.backbone import BackboneConfig, random_backbone
from tests import gloo
from tests.methods.invariance import batch, small_method

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SETTINGS = {
    "simclr": {"projection_bn": False, "projection_dim": 16},
    "moco_v1": {"queue_size": 40, "projection_dim": 16},
    "moco_v2": {"queue_size": 40, "projection_dim": 16},
    "npid": {"num_samples": 50, "num_negatives": 30, "projection_dim": 16},
    "pirl": {"num_samples": 50, "num_negatives": 30, "projection_dim": 16},
}


def _method(name: str, **args: float) -> Method:
    cls = method_class(name)
    config = BackboneConfig(name="vit_tiny_patch16_224", args={**VIT, **args}, image_size=32)
    backbone = random_backbone(config, seed=0)
    torch.manual_seed(1)
    return cls(backbone, cls.Config.model_validate({"name": name, **SETTINGS[name]})).double()


def _gradients(method: Method) -> dict[str, Tensor]:
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def _in_parts(name: str, micro_batches: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    method = _method(name).train()
    loss, _ = backward_in_parts(method, batch(0, torch.float64), micro_batches, nullcontext())
    return distributed.all_reduce_mean(loss), _gradients(method), method.state_dict()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("world", "micro_batches"), [(1, 2), (1, 4), (2, 2)])
def test_parts_equal_one_pass(name: str, world: int, micro_batches: int) -> None:
    whole = _method(name).train()
    loss, _ = whole(batch(0, torch.float64))
    loss.backward()
    ranks = [_in_parts(name, micro_batches)] if world == 1 else gloo.run(world, _in_parts, name, micro_batches)
    for rank_loss, gradients, state in ranks:
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-10, atol=0)
        assert gradients.keys() == _gradients(whole).keys()
        for key, gradient in _gradients(whole).items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-8, atol=1e-12, msg=key)
        for key, value in whole.state_dict().items():  # the queue took each key once
            torch.testing.assert_close(state[key], value, rtol=1e-10, atol=1e-12, msg=key)


def test_both_passes_drop_the_same_activations() -> None:
    """With other masks in the second pass, the gradient would not be that of the loss that was reported."""
    method = _method("moco_v1", proj_drop_rate=0.2).train()
    torch.manual_seed(5)
    loss, _ = backward_in_parts(method, batch(0, torch.float64), 1, nullcontext())
    whole = _method("moco_v1", proj_drop_rate=0.2).train()
    torch.manual_seed(5)
    expected, _ = whole(batch(0, torch.float64))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for key, gradient in _gradients(whole).items():
        torch.testing.assert_close(_gradients(method)[key], gradient, rtol=1e-8, atol=1e-12, msg=key)


def test_batchnorm_is_refused_with_what_works_instead() -> None:
    method = small_method("simclr")
    check_accumulation(method, 1)
    with pytest.raises(
        AccumulationError, match=r"micro_batches=2 would change .* BatchNorm layers \(backbone.*vit_small"
    ):
        check_accumulation(method, 2)
    check_accumulation(_method("simclr"), 2)


@pytest.mark.parametrize("rate", ["pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "drop_path_rate"])
def test_dropout_is_refused_with_the_arguments_to_set_to_0(rate: str) -> None:
    method = _method("simclr", **{rate: 0.1})
    check_accumulation(method, 1)
    with pytest.raises(AccumulationError, match=rf"micro_batches=2 would draw other masks in .*backbone.*{rate}: 0"):
        check_accumulation(method, 2)


def test_dropout_without_a_layer_of_its_own_is_refused() -> None:
    config = BackboneConfig(name="resnet18", image_size=32, args={"norm_layer": "groupnorm", "drop_rate": 0.1})
    cls = method_class("moco_v1")
    method = cls(random_backbone(config, seed=0), cls.Config.model_validate({"name": "moco_v1"}))
    with pytest.raises(AccumulationError, match=r"\(backbone.net, .*drop_rate: 0"):
        check_accumulation(method, 2)
