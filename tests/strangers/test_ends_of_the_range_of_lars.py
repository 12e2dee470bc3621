"""LARS scales each gradient to the size of its weight, so it has to work at any size: against float64, from end to end.

The error is a share of the step taken, not of the weight: a weight that never moves is off by 1.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.optim import LARS, _foreach_lars, ema_update_

ETA, MOMENTUM = 1e-3, 0.9
LRS = [100.0, 200.0, 50.0]  # times eta: steps of a tenth of the weight
FORMS = [
    {"trust_form": form, "lr_in_momentum": inside, "weight_decay": decay}
    for form, inside, decay in itertools.product(("published", "timm"), (False, True), (0.0, 0.01))
]
GRADIENTS = [1e-27, 1e-21, 1e-15, 1e-8, 1.0, 1e6, 1e9, 1e12, 1e14, 1e15, 1e21, 1e27]
WEIGHTS = [1e-24, 1e-18, 1e-9, 1e9, 1e18, 1e24]


def _oracle(weight: Tensor, gradients: list[Tensor], form: dict[str, Any]) -> Tensor:
    """Equation by equation, in float64."""
    w, v, decay = weight.double(), torch.zeros_like(weight, dtype=torch.float64), form["weight_decay"]
    for lr, gradient in zip(LRS, gradients, strict=True):
        g = gradient.double()
        update = g + decay * w
        divisor = g.norm() + decay * w.norm() + 1e-8 if form["trust_form"] == "timm" else update.norm()
        step = ETA * w.norm() / divisor * update
        v = MOMENTUM * v + (lr * step if form["lr_in_momentum"] else step)
        w = w - (v if form["lr_in_momentum"] else lr * v)
    return w


def _by_step(weight: Tensor, gradients: list[Tensor], form: dict[str, Any]) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = LARS([parameter], lr=1.0, momentum=MOMENTUM, trust_coefficient=ETA, **form)
    for lr, gradient in zip(LRS, gradients, strict=True):
        optimizer.param_groups[0]["lr"], parameter.grad = lr, gradient.clone()
        optimizer.step()
    return parameter.detach()


def _by_multi_tensor_kernels(weight: Tensor, gradients: list[Tensor], form: dict[str, Any]) -> Tensor:
    """As on accelerators; plain torch, so it runs here too."""
    weight, buffer = weight.clone(), torch.zeros_like(weight)
    for lr, gradient in zip(LRS, gradients, strict=True):
        group = {"lr": lr, "momentum": MOMENTUM, "trust_coefficient": ETA, **form}
        _foreach_lars([weight], [gradient.clone()], [buffer], group)
    return weight


def _error(ours: Tensor, weight: Tensor, gradients: list[Tensor], form: dict[str, Any]) -> float:
    """As a share of the step, or of a tenth of the weight where timm's 1e-8 makes the step smaller than that."""
    expected = _oracle(weight, gradients, form)
    step = max((expected - weight.double()).norm(), 0.1 * weight.double().norm())
    return float((ours.double() - expected).norm() / step)


def _drawn(weight: float, gradient: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    first, *rest = torch.randn(1 + len(LRS), 60, 80, generator=torch.Generator().manual_seed(0))
    return (weight * first).to(dtype), [(gradient * each).to(dtype) for each in rest]


@pytest.mark.parametrize("path", [_by_step, _by_multi_tensor_kernels])
@pytest.mark.parametrize("size", GRADIENTS)
def test_a_step_is_the_same_for_gradients_of_any_size(size: float, path: Any) -> None:
    weight, gradients = _drawn(1.0, size)
    for form in FORMS:
        assert _error(path(weight, gradients, form), weight, gradients, form) < 1e-5, form


@pytest.mark.parametrize("path", [_by_step, _by_multi_tensor_kernels])
@pytest.mark.parametrize("size", WEIGHTS)
def test_a_step_is_in_proportion_to_weights_of_any_size(size: float, path: Any) -> None:
    weight, gradients = _drawn(size, 1.0)
    for form in FORMS:
        assert _error(path(weight, gradients, form), weight, gradients, form) < 1e-5, form


@pytest.mark.parametrize("path", [_by_step, _by_multi_tensor_kernels])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_weights_of_16_bits(dtype: torch.dtype, path: Any) -> None:
    """|w|^2 is 2e8: float16 ends at 65,504, and bfloat16 has 2 digits for it."""
    for weight, gradients in (_drawn(200.0, 3.0, dtype), _drawn(0.01, 1e-4, dtype)):
        for form in FORMS:
            assert _error(path(weight, gradients, form), weight, gradients, form) < 0.05, form


def test_a_gradient_that_all_but_cancels_the_decay() -> None:
    """g + wd*w is 1e-6 of each: the expansion of its square would have no digit left."""
    weight, _ = _drawn(1e12, 1.0)
    form = {"trust_form": "published", "lr_in_momentum": False, "weight_decay": 0.5}
    gradients = [-0.5 * weight * (1 + 1e-3)] * len(LRS)
    assert _error(_by_step(weight, gradients[:3], form), weight, gradients, form) < 1e-3


def test_step_takes_the_gradients_of_its_closure_and_returns_the_loss() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = LARS([weight], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 6.0
    assert (weight < 1).all()
    assert optimizer.step() is None


@pytest.mark.parametrize("decay", [0.996, 1 - 1e-5, 1 - 1e-9])
def test_an_average_with_a_decay_near_1_moves_by_what_is_left(decay: float) -> None:
    """1 - decay is taken in float64; from 0, a float32 can hold the step."""
    online, momentum = nn.Linear(30, 40), nn.Linear(30, 40)
    for parameter in momentum.parameters():
        nn.init.zeros_(parameter)
    ema_update_([(online, momentum)], decay)
    for source, moved in zip(online.parameters(), momentum.parameters(), strict=True):
        torch.testing.assert_close(moved.double(), (1 - decay) * source.double(), rtol=1e-6, atol=0)
