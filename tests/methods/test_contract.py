"""What every method must do; a new file in pipeline/methods is covered without a change here."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import load_config
from pipeline.methods.base import Method, method_class, method_names
from pipeline.optim import OptimConfig, build_optimizer, ema_update_
from tests.methods.invariance import CONFIGS, batch, small_method

METHODS = method_names()


def _train(method: Method, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    for step in steps:
        loss, _ = method(batch(step, torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(method.momentum_pairs(), 0.9)
    return loss.detach()


def _optimizer(method: Method) -> torch.optim.Optimizer:
    return build_optimizer(method, OptimConfig(name="sgd"), peak=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_is_trained_and_nothing_else(name: str) -> None:
    method = small_method(name)
    loss, metrics = method(batch(0, torch.float32))
    assert loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    loss.backward()
    momentum = {id(p) for _, module in method.momentum_pairs() for p in module.parameters()}
    for key, parameter in method.named_parameters():
        if id(parameter) in momentum:
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key
        elif parameter.requires_grad:
            assert parameter.grad is not None, key
    reached = [p.grad.abs().sum() > 0 for p in method.backbone.parameters() if p.grad is not None]
    assert len(reached) == len(list(method.backbone.parameters()))
    # a zero-initialised residual scale keeps gradients from the layers below it, until it has moved once
    _train(method, _optimizer(method), range(2))
    for key, parameter in method.backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", METHODS)
def test_momentum_modules_start_equal_and_follow_the_decay(name: str) -> None:
    method = small_method(name)
    for online, momentum in method.momentum_pairs():
        for a, b in zip(online.parameters(), momentum.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    before = [copy.deepcopy(momentum) for _, momentum in method.momentum_pairs()]
    _train(method, _optimizer(method), range(1))
    for (online, momentum), old in zip(method.momentum_pairs(), before, strict=True):
        for a, b, c in zip(online.parameters(), momentum.parameters(), old.parameters(), strict=True):
            torch.testing.assert_close(b, 0.9 * c + 0.1 * a)
    has_decay = "ema_decay" in type(method).Config.model_fields
    assert has_decay == bool(method.momentum_pairs()), "ema_decay is declared if and only if there is what it moves"


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_restores_the_run_exactly(name: str) -> None:
    straight = small_method(name)
    expected = _train(straight, _optimizer(straight), range(4))
    first = small_method(name)
    optimizer = _optimizer(first)
    _train(first, optimizer, range(2))
    stream = io.BytesIO()
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    second = small_method(name)
    _train(second, _optimizer(second), range(7, 8))  # a history of its own, which must not matter
    optimizer = _optimizer(second)
    second.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    assert torch.equal(_train(second, optimizer, range(2, 4)), expected)
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_gives_a_float32_loss_close_to_the_default(name: str) -> None:
    method = small_method(name)
    expected, _ = method(batch(0, torch.float32))
    method = small_method(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = method(batch(0, torch.float32))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_ships_with_the_method(name: str) -> None:
    config = load_config(CONFIGS / f"{name}-resnet50-224.yaml")
    assert config.method.name == name
    assert sum(view.count for view in config.method.views) in (1, 2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name.replace("-", "_") == path.stem.replace("-", "_")


def test_an_unknown_method_is_an_error_that_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no method 'mocov2'; methods are barlow, byol, moco_v1"):
        method_class("mocov2")
