"""LARS against a ten-line oracle, the published formula, timm and Barlow Twins' rule, over 100 steps; groups; EMA."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from pipeline.models.heads import mlp
from pipeline.optim import (
    LARS,
    OptimConfig,
    OptimError,
    _foreach_lars,
    build_optimizer,
    ema_update_,
    match_layouts_,
    peak_lr,
    set_lr,
)

STEPS = 100


def _lars_oracle(
    weights: list[Tensor], gradients: list[list[Tensor]], lrs: list[float], momentum: float, decay: float, eta: float
) -> list[Tensor]:
    """Equation by equation, with LR outside the buffer: SimCLR, BYOL and Barlow Twins."""
    weights = [w.clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for step, lr in enumerate(lrs):
        for w, v, g in zip(weights, buffers, gradients[step], strict=True):
            update = g.clone()
            if w.ndim > 1:
                update = g + decay * w
                if w.norm() > 0 and update.norm() > 0:
                    update *= eta * w.norm() / update.norm()
            v.copy_(momentum * v + update)
            w -= lr * v
    return weights


def _simclr_tensorflow(
    weights: list[Tensor], gradients: list[list[Tensor]], lrs: list[float], momentum: float, decay: float, eta: float
) -> list[Tensor]:
    """google-research/simclr, lars_optimizer.py: the learning rate is inside the momentum buffer."""
    weights = [w.clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for step, lr in enumerate(lrs):
        for index, (w, v, g) in enumerate(zip(weights, buffers, gradients[step], strict=True)):
            grad = g + decay * w if w.ndim > 1 else g
            trust = eta * w.norm() / grad.norm() if w.ndim > 1 and w.norm() > 0 and grad.norm() > 0 else 1.0
            next_v = momentum * v + trust * lr * grad
            weights[index] = w - next_v
            v.copy_(next_v)
    return weights


def _parameters(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2))
    nn.init.zeros_(model[4].weight)  # |w| = 0: not adapted until it has moved
    return model.to(dtype)


def _gradients(model: nn.Module, steps: int = STEPS) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [p.shape for p in model.parameters()]
    kind = next(model.parameters()).dtype
    return [[torch.randn(s, generator=generator, dtype=kind) for s in shapes] for _ in range(steps)]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]], lrs: list[float]) -> None:
    for step, lr in enumerate(lrs):
        for parameter, gradient in zip(model.parameters(), gradients[step], strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


LRS = [0.2 * (step + 1) for step in range(STEPS)]  # changes every step, so that LR inside and outside differ


@pytest.mark.parametrize("decay", [0.0, 1e-6, 1e-2, 10.0])
@pytest.mark.parametrize(
    ("inside", "oracle"), [(False, _lars_oracle), (True, _simclr_tensorflow)], ids=["lr-outside", "lr-in-momentum"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_equals_the_published_formula_over_100_steps(
    decay: float, inside: bool, oracle: Callable[..., list[Tensor]], dtype: torch.dtype
) -> None:
    model = _parameters(dtype)
    gradients = _gradients(model)
    start = [p.detach().double().clone() for p in model.parameters()]
    expected = oracle(start, [[g.double() for g in row] for row in gradients], LRS, 0.9, decay, 0.001)
    config = OptimConfig(name="lars", weight_decay=decay, lr_in_momentum=inside)
    _train(model, build_optimizer(model, config, peak=1.0), gradients, LRS)
    tolerance = 1e-10 if dtype == torch.float64 else 3e-5
    for parameter, value in zip(model.parameters(), expected, strict=True):
        error = (parameter.double() - value).norm() / value.norm()
        assert error < tolerance, (tuple(parameter.shape), float(error))


def test_the_timm_form_equals_timm_over_100_steps() -> None:
    ours, theirs = _parameters(torch.float64), _parameters(torch.float64)
    gradients = _gradients(ours)
    config = OptimConfig(name="lars", weight_decay=1e-2, trust_form="timm")
    _train(ours, build_optimizer(ours, config, peak=1.0), gradients, LRS)
    weights = [p for p in theirs.parameters() if p.ndim > 1]
    biases = [p for p in theirs.parameters() if p.ndim <= 1]  # timm switches adaptation off where the decay is 0
    lars = timm.optim.Lars(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=1.0, momentum=0.9, weight_decay=1e-2
    )
    _train(theirs, lars, gradients, LRS)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["published", "timm"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_multi_tensor_path_of_accelerators_equals_the_cpu_path(form: str, inside: bool) -> None:
    """It is plain torch, so it runs on CPU tensors too; only its speed needs an accelerator."""
    ours, other = _parameters(torch.float64), _parameters(torch.float64)
    gradients = _gradients(ours, steps=20)
    config = OptimConfig.model_validate({"weight_decay": 1e-2, "trust_form": form, "lr_in_momentum": inside})
    optimizer = build_optimizer(ours, config, peak=1.0)
    _train(ours, optimizer, gradients, LRS[:20])
    weights = [p.detach() for p in other.parameters() if p.ndim > 1]
    buffers = [torch.zeros_like(w) for w in weights]
    group: dict[str, Any] = dict(optimizer.param_groups[0])
    for step, lr in enumerate(LRS[:20]):
        group["lr"] = lr
        _foreach_lars(weights, [g for g in gradients[step] if g.ndim > 1], buffers, group)
    for mine, value in zip([p for p in ours.parameters() if p.ndim > 1], weights, strict=True):
        torch.testing.assert_close(mine.detach(), value, rtol=1e-10, atol=1e-12)


def test_lars_survives_a_gradient_that_cancels_the_decay() -> None:
    """|g + wd*w|^2 expanded loses every digit when g = -wd*w(1 + 1e-6); the ratio must not."""
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    start = weight.detach().clone()
    weight.grad = -0.5 * start * (1 + 1e-6)
    update = weight.grad + 0.5 * start
    LARS([weight], lr=1.0, weight_decay=0.5).step()
    expected = start - 0.001 * start.norm() / update.norm() * update
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-6)


def test_channels_last_weights_take_the_same_steps() -> None:
    models = [nn.Conv2d(3, 4, 3, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    for model in models:
        optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-2), peak=10.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert model.weight.grad.stride() == model.weight.stride()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_a_gradient_of_another_layout_gives_the_same_ratio() -> None:
    weight, gradient = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    expected = start = None
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = gradient.contiguous(memory_format=layout)
        LARS([parameter], lr=1.0, weight_decay=0.5).step()
        start, expected = expected, parameter.detach()
    torch.testing.assert_close(start, expected)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_run_resumes_in_another_memory_format(name: str) -> None:
    """torch's fused kernels would take the contiguous state for a channels_last one."""
    config = OptimConfig.model_validate({"name": name, "weight_decay": 1e-2})
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for resumed_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, bias=False).double()
        optimizer = build_optimizer(model, config, peak=0.1)
        for step in range(4):
            if step == 2:
                model.to(memory_format=resumed_format)
                match_layouts_(optimizer)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_lars_leaves_gradients_alone() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    weight.grad = torch.full((3, 3), 2.0)
    LARS([weight], lr=0.1, weight_decay=0.1).step()
    assert weight.grad.eq(2).all()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_norms_are_out_of_decay(name: str) -> None:
    """With zero gradients only weight decay moves a parameter."""
    model = mlp([4, 8, 2], last_bn="affine")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    config = OptimConfig.model_validate({"name": name, "weight_decay": 0.1})
    optimizer = build_optimizer(model, config, peak=0.5)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not p.eq(1).all()}
    assert moved == {"0.weight", "3.weight"}
    optimizer = build_optimizer(model, config.model_copy(update={"decay_biases": True}), peak=0.5)
    optimizer.step()
    assert not [n for n, p in model.named_parameters() if p.eq(1).all()]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_an_optimizer_resumes_from_its_state_dict(name: str) -> None:
    config = OptimConfig.model_validate({"name": name, "weight_decay": 1e-2})
    straight = _parameters(torch.float64)
    gradients = _gradients(straight, steps=10)
    resumed = copy.deepcopy(straight)
    _train(straight, build_optimizer(straight, config, 1.0), gradients, LRS[:10])
    first = build_optimizer(resumed, config, 1.0)
    _train(resumed, first, gradients[:5], LRS[:5])
    second = build_optimizer(resumed, config, 1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _train(resumed, second, gradients[5:], LRS[5:10])
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sgd_and_adamw_are_those_of_torch() -> None:
    for name, reference in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.0)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, foreach=False, fused=False)),
    ):
        ours, theirs = _parameters(torch.float64), _parameters(torch.float64)
        gradients = _gradients(ours, steps=10)
        config = OptimConfig.model_validate({"name": name, "weight_decay": 0.0})
        _train(ours, build_optimizer(ours, config, 0.1), gradients, [0.1] * 10)
        _train(theirs, reference(theirs.parameters()), gradients, [0.1] * 10)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class _WithPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.predictor = nn.Linear(2, 2)


def test_set_lr_moves_all_but_constant_groups_and_scales_biases() -> None:
    config = OptimConfig(name="sgd", constant_lr=("predictor",), bias_lr=0.5)
    model = _WithPredictor()
    optimizer = build_optimizer(model, config, peak=0.8)
    set_lr(optimizer, 0.2)
    lr_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {n: lr_of[id(p)] for n, p in model.named_parameters()} == pytest.approx(
        {"backbone.weight": 0.2, "backbone.bias": 0.1, "predictor.weight": 0.8, "predictor.bias": 0.4}
    )


def test_a_constant_group_that_is_no_submodule_is_an_error_that_teaches() -> None:
    with pytest.raises(OptimError, match=r"constant_lr names 'head'; the submodules .* are backbone, predictor"):
        build_optimizer(_WithPredictor(), OptimConfig(constant_lr=("head",)), peak=1.0)


def test_both_of_simclrs_scaling_rules_give_4_8_at_4096() -> None:
    assert peak_lr(OptimConfig(lr=0.3), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimConfig(lr=0.075, lr_scaling="sqrt"), 4096) == pytest.approx(4.8)
    assert peak_lr(OptimConfig(lr=1e-3, lr_scaling="none"), 4096) == 1e-3


def test_ema_moves_parameters_by_the_decay_and_leaves_buffers_alone() -> None:
    torch.manual_seed(0)
    online, momentum = mlp([3, 4, 2]).double(), mlp([3, 4, 2]).double()
    online(torch.randn(8, 3).double())  # moves the online running statistics
    before = copy.deepcopy(momentum)
    ema_update_([(online, momentum)], 0.9)
    for old, new, source in zip(before.parameters(), momentum.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source, rtol=1e-14, atol=0)
    for old, new in zip(before.buffers(), momentum.buffers(), strict=True):
        assert torch.equal(old, new)
    assert all(p.grad is None and p.is_leaf for p in momentum.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_ema_reads_an_online_network_in_another_memory_layout(decay: float) -> None:
    online, momentum = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    expected = [
        decay * m.double() + (1 - decay) * o.double()
        for m, o in zip(momentum.parameters(), online.parameters(), strict=True)
    ]
    ema_update_([(online.to(memory_format=torch.channels_last), momentum)], decay)
    for parameter, value in zip(momentum.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-6, atol=1e-7)
