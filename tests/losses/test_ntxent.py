"""NT-Xent against the paper's equation in float64, HCL's release, lightly, across ranks, and within its memory."""

import math
import subprocess
import sys

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from pipeline import distributed
from pipeline.losses import ntxent as module
from pipeline.losses.ntxent import ntxent
from pipeline.losses.precision import SMALLEST_TEMPERATURE
from tests import gloo


def _pairs(n: int, dim: int = 16, dtype: torch.dtype = torch.float64, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Views that resemble each other, of lengths far from 1. The less noise, the nearer the loss is to solved."""
    generator = torch.Generator().manual_seed(n)
    common = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    views = [3 * (common + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64)) for _ in range(2)]
    return views[0].to(dtype), views[1].to(dtype)


def _oracle(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of the paper, anchor by anchor."""
    n = len(z1)
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    losses = []
    for i in range(2 * n):
        logits = torch.stack([z[i] @ z[k] / temperature for k in range(2 * n) if k != i])
        positive = z[i] @ z[(i + n) % (2 * n)] / temperature
        losses.append(torch.logsumexp(logits, 0) - positive)
    return torch.stack(losses).mean()


def _corrected_oracle(z1: Tensor, z2: Tensor, temperature: float, positive_prior: float, hardness: float) -> Tensor:
    """The criterion of HCL's release, with its mask of negatives, anchor by anchor."""
    n = len(z1)
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    losses = []
    for i in range(2 * n):
        other_view = (i + n) % (2 * n)
        neg = torch.stack([torch.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k not in (i, other_view)])
        pos = torch.exp(z[i] @ z[other_view] / temperature)
        imp = (hardness * neg.log()).exp()
        reweighted = (imp * neg).sum() / imp.mean()
        count = 2 * n - 2
        ng = ((-positive_prior * count * pos + reweighted) / (1 - positive_prior)).clamp(
            min=count * math.exp(-1 / temperature)
        )
        losses.append(-torch.log(pos / (pos + ng)))
    return torch.stack(losses).mean()


CORRECTIONS = [(0.0, 1.0), (0.1, 0.0), (0.02, 0.5), (0.6, 2.0)]  # at 0.6 the floor holds for some anchors


@pytest.mark.parametrize(("positive_prior", "hardness"), CORRECTIONS)
@pytest.mark.parametrize("tile", [5, 512])
def test_debiased_and_hard_losses_equal_the_release_of_hcl(
    monkeypatch: pytest.MonkeyPatch, positive_prior: float, hardness: float, tile: int
) -> None:
    monkeypatch.setattr(module, "CPU_TILE", tile)
    z1, z2 = (z.requires_grad_() for z in _pairs(8, noise=2))
    loss = ntxent(z1, z2, 0.3, positive_prior=positive_prior, hardness=hardness)
    actual = _loss_and_gradients(loss, z1, z2)
    expected = _loss_and_gradients(_corrected_oracle(z1, z2, 0.3, positive_prior, hardness), z1, z2)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_sums_that_underflow_have_a_finite_gradient() -> None:
    z = torch.tensor([[1.0, 0.1], [-1.0, -0.1]], requires_grad=True)
    loss, gradient = _loss_and_gradients(ntxent(z, z, 0.001), z)
    assert loss == 0
    assert gradient.isfinite().all()


def test_the_smallest_temperature_is_exact_on_alike_and_on_opposite_samples() -> None:
    rows = torch.tensor([[1.0, 0.2], [-1.0, -0.2], [1.0, 0.2], [0.3, -1.0]], dtype=torch.float64)
    z1, z2 = rows.clone().requires_grad_(), rows.flip(0).requires_grad_()
    actual = _loss_and_gradients(ntxent(z1, z2, SMALLEST_TEMPERATURE), z1, z2)
    expected = _loss_and_gradients(_oracle(z1, z2, SMALLEST_TEMPERATURE), z1, z2)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_the_corrected_loss_is_finite_in_float32_at_small_temperatures() -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs(40, 16, torch.float32))
    loss, *gradients = _loss_and_gradients(ntxent(z1, z2, 0.03, positive_prior=0.1, hardness=1.0), z1, z2)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def _loss_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("tile", [5, 8, 512])
def test_loss_and_gradients_equal_the_paper_in_float64(
    monkeypatch: pytest.MonkeyPatch, temperature: float, tile: int
) -> None:
    monkeypatch.setattr(module, "CPU_TILE", tile)
    z1, z2 = (z.requires_grad_() for z in _pairs(8))
    actual = _loss_and_gradients(ntxent(z1, z2, temperature), z1, z2)
    expected = _loss_and_gradients(_oracle(z1, z2, temperature), z1, z2)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.01])
def test_float32_gradients_are_exact_to_1e_6(temperature: float) -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs(700, 128, torch.float32, noise=2))
    _, *actual = _loss_and_gradients(ntxent(z1, z2, temperature), z1, z2)
    w1, w2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    _, *expected = _loss_and_gradients(ntxent(w1, w2, temperature), w1, w2)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).norm() / e.norm()) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_bf16_embeddings_under_autocast_are_finite_and_close(temperature: float) -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs(300, 128, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ntxent(z1, z2, temperature)
    assert loss.dtype == torch.float32
    _, *actual = _loss_and_gradients(loss, z1, z2)
    w1, w2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    _, *expected = _loss_and_gradients(ntxent(w1, w2, temperature), w1, w2)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16  # so the gradient itself is rounded to 2^-9
        assert float((a.double() - e).norm() / e.norm()) < 2e-3


def test_low_precision_tiles_as_accelerators_use_them_are_within_5e_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_dtype", lambda *_: torch.bfloat16)
    z1, z2 = (z.requires_grad_() for z in _pairs(512, 128, torch.float32, noise=2))
    _, *actual = _loss_and_gradients(ntxent(z1, z2, 0.1), z1, z2)
    monkeypatch.undo()
    _, *expected = _loss_and_gradients(ntxent(z1, z2, 0.1), z1, z2)
    for a, e in zip(actual, expected, strict=True):
        error = float((a - e).norm() / e.norm())
        assert 1e-6 < error < 5e-4  # bf16 was really used, and is close enough


def test_equals_lightly() -> None:
    """lightly, like us and unlike the TensorFlow release, takes the mean over all 2N anchors."""
    z1, z2 = (z.requires_grad_() for z in _pairs(32, 16, torch.float32))
    actual = _loss_and_gradients(ntxent(z1, z2, 0.2), z1, z2)
    expected = _loss_and_gradients(NTXentLoss(0.2)(z1, z2), z1, z2)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


def _on_rank(tile: int, settings: dict[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    rank, world = distributed.rank(), distributed.world_size()
    module.CPU_TILE = tile
    z1, z2 = (z.chunk(world)[rank].clone().requires_grad_() for z in _pairs(8))
    loss, g1, g2 = _loss_and_gradients(ntxent(z1, z2, 0.1, **settings), z1, z2)
    return loss, g1 / world, g2 / world  # DistributedDataParallel's mean


@pytest.mark.parametrize(("world", "tile"), [(2, 4), (2, 512), (4, 3)])
@pytest.mark.parametrize(("positive_prior", "hardness"), [(0.0, 0.0), (0.002, 0.5)])
def test_ranks_that_share_the_tiles_equal_one_process(
    world: int, tile: int, positive_prior: float, hardness: float
) -> None:
    z1, z2 = (z.requires_grad_() for z in _pairs(8))
    loss, g1, g2 = _loss_and_gradients(_corrected_oracle(z1, z2, 0.1, positive_prior, hardness), z1, z2)
    results = gloo.run(world, _on_rank, tile, {"positive_prior": positive_prior, "hardness": hardness})
    for rank_loss, _, _ in results:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g, _ in results]), g1, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.cat([g for _, _, g in results]), g2, rtol=1e-10, atol=1e-14)


PEAK = """
import re, torch
from pipeline.losses.ntxent import ntxent
def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
ntxent(*torch.randn(2, 64, 128).requires_grad_().unbind(), 0.1).backward()
z1, z2 = torch.randn(2, {n}, 128).requires_grad_().unbind()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far, which importing torch made
before = kib("VmRSS")
ntxent(z1, z2, 0.1).backward()
print(kib("VmHWM") - before)
"""


def _peak_mib(n: int) -> float:
    run = subprocess.run([sys.executable, "-c", PEAK.format(n=n)], capture_output=True, text=True, check=True)
    return int(run.stdout.split()[-1]) / 1024


def test_peak_memory_grows_with_n_and_not_with_its_square() -> None:
    """The matrix alone would take 64 MiB at N = 2048 and 1024 MiB at 8192; the embeddings take 2 and 8."""
    small, large = _peak_mib(2048), _peak_mib(8192)
    assert large < 6 * small
    assert large < 100


@pytest.mark.heavy
def test_32768_pairs_fit_in_1_gib() -> None:
    assert _peak_mib(32768) < 1024
