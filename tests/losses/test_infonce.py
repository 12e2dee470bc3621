"""InfoNCE against a float64 cross-entropy over the written-out logits, and against lightly's memory bank."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor

from pipeline.losses import infonce
from pipeline.losses.infonce import info_nce, log_sum_exp_similarity
from pipeline.losses.precision import SMALLEST_TEMPERATURE


def _rows(n: int, seed: int, dim: int = 16) -> Tensor:
    return F.normalize(torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def _oracle(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.05, 0.01])
@pytest.mark.parametrize("block", [7, 512])
def test_loss_and_gradient_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, temperature: float, block: int) -> None:
    monkeypatch.setattr(infonce, "CPU_BLOCK", block)
    query, positive, negatives = _rows(6, 0).requires_grad_(), _rows(6, 1), _rows(40, 2)
    actual = info_nce(query, positive, negatives, temperature)
    expected = _oracle(query, positive, negatives, temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual_gradient, expected_gradient = (torch.autograd.grad(loss, query)[0] for loss in (actual, expected))
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def _hcl(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    positive_prior: float,
    hardness: float,
    sample_ids: tuple[Tensor, Tensor],
) -> Tensor:
    """The criterion of HCL's release, query by query, over the negatives of other samples."""
    losses = []
    for q, k, own in zip(query, positive, sample_ids[0], strict=True):
        others = negatives[sample_ids[1] != own]
        neg, pos, n = torch.exp(others @ q / temperature), torch.exp(k @ q / temperature), len(others)
        imp = (hardness * neg.log()).exp()
        reweighted = (imp * neg).sum() / imp.mean()
        ng = (-positive_prior * n * pos + reweighted) / (1 - positive_prior)
        losses.append(-torch.log(pos / (pos + ng.clamp(min=n * math.exp(-1 / temperature)))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("positive_prior", [0.0, 0.1, 0.6])  # at 0.6 the floor holds for some queries
@pytest.mark.parametrize("hardness", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("repeated", [False, True])
def test_debiased_hard_and_exclusive_losses_equal_the_release_of_hcl(
    monkeypatch: pytest.MonkeyPatch, positive_prior: float, hardness: float, repeated: bool
) -> None:
    monkeypatch.setattr(infonce, "CPU_BLOCK", 7)
    query, positive, negatives = _rows(6, 0).requires_grad_(), _rows(6, 1), _rows(40, 2)
    positive = F.normalize(query.detach() + 0.3 * positive, dim=1)
    ids = torch.arange(6), torch.arange(40) % (9 if repeated else 1000) + (0 if repeated else 6)
    settings = {"positive_prior": positive_prior, "hardness": hardness}
    actual = info_nce(query, positive, negatives, 0.2, **settings, sample_ids=ids)
    expected = _hcl(query, positive, negatives, 0.2, positive_prior, hardness, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    actual_gradient, expected_gradient = (torch.autograd.grad(loss, query)[0] for loss in (actual, expected))
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    if not repeated:
        torch.testing.assert_close(info_nce(query, positive, negatives, 0.2, **settings), actual, rtol=1e-12, atol=0)


def test_the_debiased_loss_is_finite_in_float32_at_small_temperatures() -> None:
    query = _rows(6, 0).float().requires_grad_()
    loss = info_nce(query, query.detach(), _rows(40, 2).float(), 0.01, positive_prior=0.5, hardness=1.0)
    (gradient,) = torch.autograd.grad(loss, query)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("queue", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_float32_and_a_bf16_queue_are_close_to_float64(queue: torch.dtype, tolerance: float) -> None:
    query, positive, negatives = _rows(32, 0, 128), _rows(32, 1, 128), _rows(2000, 2, 128)
    q32 = query.float().requires_grad_()
    (actual,) = torch.autograd.grad(info_nce(q32, positive.float(), negatives.to(queue), 0.07), q32)
    (expected,) = torch.autograd.grad(_oracle(query.requires_grad_(), positive, negatives, 0.07), query)
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def test_the_gradient_passes_a_numerical_check() -> None:
    query, keys = _rows(3, 3, 4).requires_grad_(), _rows(5, 4, 4)
    assert torch.autograd.gradcheck(lambda q: log_sum_exp_similarity(q, keys, 0.3), query)


def test_equals_lightlys_loss_with_a_memory_bank() -> None:
    query, positive = 3 * _rows(8, 5).float().requires_grad_(), _rows(8, 6).float()
    loss = NTXentLoss(0.2, memory_bank_size=(64, 16))
    negatives = loss.memory_bank.bank.clone()
    expected = loss(query, positive)  # normalises by itself
    actual = info_nce(F.normalize(query, dim=1), positive, negatives, 0.2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, query, retain_graph=True)[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_the_debiased_floor_does_not_underflow_at_the_smallest_temperature() -> None:
    """All keys opposite to the query: N negatives at the floor, N e^{-1/T}, and the positive as far away."""
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = info_nce(query, -query, -query.detach().expand(5, 2), SMALLEST_TEMPERATURE, positive_prior=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6))
    assert query.grad is not None
    assert query.grad.isfinite().all()
