"""The losses of the methods: slow float64 oracles written from the papers, and lightly on the same tensors.

Known differences from lightly are part of the tests: BYOL sums two directions of 2 - 2 cos where lightly's examples
average -cos, a factor of 4 in the gradient.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from torch import Tensor

from pipeline.losses.nce import nce
from pipeline.methods.barlow import BarlowTwins, barlow_loss
from pipeline.methods.byol import byol_loss
from pipeline.methods.moco_v3 import moco_v3_loss
from pipeline.methods.simsiam import simsiam_loss
from pipeline.methods.vicreg import vicreg_loss
from pipeline.negatives.queue import MomentumQueue
from tests.methods.invariance import batch, small_method

N, D = 12, 6


def _embeddings(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    common, *noise = torch.randn(3, N, D, dtype=torch.float64, generator=generator)
    z1, z2 = (0.7 * common + 0.3 * n for n in noise)
    return z1.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_()


def _same(
    actual: Callable[[Tensor, Tensor], Tensor],
    expected: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
) -> None:
    """Equal losses and equal gradients to both inputs."""
    pair = _embeddings(dtype)
    a, e = actual(*pair), expected(*pair)
    torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(loss, pair, allow_unused=True) for loss in (a, e)]
    for mine, other in zip(*gradients, strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, other, rtol=10 * tolerance, atol=tolerance)


def _vicreg_oracle(z1: Tensor, z2: Tensor) -> Tensor:
    """main_vicreg.py of the release, entry by entry."""
    variance, covariance = z1.new_zeros(()), z1.new_zeros(())
    for z in (z1, z2):
        for d in range(D):
            column = z[:, d] - z[:, d].sum() / N
            std = ((column**2).sum() / (N - 1) + 1e-4) ** 0.5
            variance = variance + torch.clamp(1 - std, min=0) / D / 2
            for other in range(D):
                if other != d:
                    covariance = covariance + ((column * (z[:, other] - z[:, other].mean())).sum() / (N - 1)) ** 2 / D
    invariance = sum(((a - b) ** 2).sum() for a, b in zip(z1, z2, strict=True)) / (N * D)
    return 25 * invariance + 25 * variance + covariance


def test_vicreg_equals_the_release_and_lightly() -> None:
    _same(lambda a, b: vicreg_loss(a, b, 25.0, 25.0, 1.0), _vicreg_oracle)
    _same(lambda a, b: vicreg_loss(a, b, 25.0, 25.0, 1.0), VICRegLoss(), torch.float32, 1e-5)


def _barlow_oracle(z1: Tensor, z2: Tensor) -> Tensor:
    z1, z2 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5) ** 0.5 for z in (z1, z2))
    total = z1.new_zeros(())
    for i in range(D):
        for j in range(D):
            c = (z1[:, i] * z2[:, j]).sum() / N
            total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
    return total


def test_barlow_equals_the_paper_and_lightly() -> None:
    def standardised(a: Tensor, b: Tensor) -> Tensor:
        bn = torch.nn.BatchNorm1d(D, affine=False).to(a.dtype)
        return barlow_loss(bn(a), bn(b), 0.0051)

    _same(standardised, _barlow_oracle)
    _same(standardised, BarlowTwinsLoss(lambda_param=0.0051), torch.float32, 1e-5)


def test_the_barlow_method_standardises_what_it_correlates() -> None:
    method = small_method("barlow")
    assert isinstance(method, BarlowTwins)
    z = method.standardize(method.projection_head(method.backbone(batch(0, torch.float32).views[0])))
    torch.testing.assert_close(z.var(0, unbiased=False), torch.ones(z.shape[1]), rtol=1e-2, atol=0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x @ y / (x.norm() * y.norm()) for x, y in zip(a, b, strict=True)])


def test_byol_equals_the_paper_and_lightlys_cosine() -> None:
    _same(byol_loss, lambda p, t: (2 - 2 * _cosine(p, t.detach())).mean())
    _same(byol_loss, lambda p, t: 2 + 2 * NegativeCosineSimilarity()(p, t.detach()), torch.float32, 1e-5)


def test_simsiam_equals_the_paper_and_lightly() -> None:
    _same(simsiam_loss, lambda p, z: -_cosine(p, z.detach()).mean())
    _same(simsiam_loss, lambda p, z: NegativeCosineSimilarity()(p, z.detach()), torch.float32, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_moco_v3_equals_the_papers_pseudocode(temperature: float) -> None:
    def pseudocode(q: Tensor, k: Tensor) -> Tensor:
        """Algorithm 1: ctr(q, k)."""
        q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k.detach()))
        logits = q @ k.T
        return torch.nn.functional.cross_entropy(logits / temperature, torch.arange(N)) * 2 * temperature

    _same(lambda q, k: moco_v3_loss(q, k, temperature), pseudocode)


def _method_loss(name: str) -> tuple[Tensor, list[Tensor]]:
    """A method's loss, and the prediction, projection (...) of both views that its parts give."""
    method = small_method(name).double()
    views = batch(0, torch.float64).views
    loss, _ = method(batch(0, torch.float64))
    parts = small_method(name).double()
    z1, z2 = (parts.projection_head(parts.backbone(view)) for view in views)
    p1, p2 = (parts.predictor(z) for z in (z1, z2))
    if not parts.momentum_pairs():
        return loss, [p1, p2, z1, z2]
    return loss, [p1, p2, *(parts.momentum_head(parts.momentum_backbone(view)) for view in views)]


def test_byol_and_moco_v3_sum_both_directions_and_simsiam_averages_them() -> None:
    loss, (p1, p2, t1, t2) = _method_loss("byol")
    torch.testing.assert_close(loss, (4 - 2 * _cosine(p1, t2) - 2 * _cosine(p2, t1)).mean())
    loss, (p1, p2, k1, k2) = _method_loss("moco_v3")
    torch.testing.assert_close(loss, moco_v3_loss(p1, k2, 1.0) + moco_v3_loss(p2, k1, 1.0))
    loss, (p1, p2, z1, z2) = _method_loss("simsiam")
    torch.testing.assert_close(loss, -(_cosine(p1, z2) + _cosine(p2, z1)).mean() / 2)


def test_moco_compares_with_the_old_queue_and_then_enqueues() -> None:
    """Enqueuing first would make each positive its own negative, and floor the loss at ln 2."""
    method = small_method("moco_v1").double()
    queue = method.queue.negatives().clone()
    views = batch(0, torch.float64).views
    loss, _ = method(batch(0, torch.float64))
    other = small_method("moco_v1").double()
    q = torch.nn.functional.normalize(other.projection_head(other.backbone(views[0])), dim=1)
    k = torch.nn.functional.normalize(other.momentum_head(other.momentum_backbone(views[1])), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.07
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)))
    torch.testing.assert_close(method.queue.negatives()[: len(k)], k)
    torch.testing.assert_close(method.queue.negatives()[len(k) :], queue[len(k) :])
    assert method.queue.sample_ids.tolist() == [*range(len(k)), *[-1] * (len(queue) - len(k))]


def test_moco_leaves_out_keys_of_its_own_images_where_asked() -> None:
    """The second pass over the same batch: its keys are in the queue, and each query has one of them."""

    def second_loss(exclude: bool) -> tuple[Tensor, MomentumQueue]:
        method = small_method("moco_v1", exclude_own_keys=exclude).double()
        method(batch(0, torch.float64))
        queue = copy.deepcopy(method.queue)
        loss, _ = method(batch(0, torch.float64))
        return loss, queue

    loss, queue = second_loss(exclude=True)
    with_them, _ = second_loss(exclude=False)
    q, k = small_method("moco_v1").double().embed(batch(0, torch.float64).views)
    own, others = (q * k).sum(1) / 0.07, q @ queue.keys.T / 0.07
    others[torch.arange(len(q))[:, None] == queue.sample_ids[None]] = -torch.inf
    expected = (torch.cat([own[:, None], others], 1).logsumexp(1) - own).mean()
    torch.testing.assert_close(loss, expected)
    assert with_them > loss + 0.2, "a query's own key is the most similar one"


def test_npid_compares_with_the_old_slots_estimates_z_once_and_then_moves_the_slots() -> None:
    method, other = (small_method("npid").double() for _ in range(2))
    old, ids = other.bank.state_dict()["slots"].clone(), torch.arange(16)
    other.bank.expect(ids, 30)
    _, drawn, _ = other.bank.read()
    loss, metrics = method(batch(0, torch.float64))
    embeddings = other.embed(batch(0, torch.float64).views)
    own = torch.stack([(f * old[ids]).sum(1) / 0.07 for f in embeddings])  # (views, B)
    noise = torch.stack([f @ old[drawn].T / 0.07 for f in embeddings])  # (views, B, M)
    is_own = (ids[:, None] == drawn[None]).expand_as(noise)
    z = 50 * torch.cat([own.exp().flatten(), noise[~is_own].exp()]).mean()
    torch.testing.assert_close(method.log_z, z.log().detach())
    p_own, p_noise = own.exp() / z, noise.exp() / z
    told = torch.log(p_own / (p_own + 30 / 50))
    told_noise = torch.log(1 - p_noise / (p_noise + 30 / 50)).masked_fill(is_own, 0).sum(-1)
    torch.testing.assert_close(loss, -(told + told_noise).mean())
    mean = torch.nn.functional.normalize(torch.stack(embeddings).mean(0), dim=1)
    torch.testing.assert_close(
        method.bank.slots[ids], torch.nn.functional.normalize(0.5 * old[ids] + 0.5 * mean, dim=1)
    )
    assert torch.equal(method.bank.slots[16:], old[16:])
    method(batch(1, torch.float64))
    torch.testing.assert_close(method.log_z, z.log().detach())
    assert metrics["loss_vs_chance"] > 0


def test_the_proximal_term_of_npid_holds_an_embedding_near_its_slot() -> None:
    """Equation 10 of the paper, in the loss and its gradient; what is told of chance is the rest."""
    plain, held, other = (small_method("npid", proximal_weight=w).double() for w in (0.0, 30.0, 0.0))
    old = held.bank.state_dict()["slots"].clone()
    (base, metrics), (loss, with_it) = plain(batch(0, torch.float64)), held(batch(0, torch.float64))
    distance = sum(
        ((f[row] - old[row]) ** 2).sum() / 32 for f in other.embed(batch(0, torch.float64).views) for row in range(16)
    )
    torch.testing.assert_close(loss, base + 30 * distance)
    assert with_it == metrics
    for module, value in ((plain, base), (held, loss), (other, 30 * distance)):
        module.zero_grad()
        value.backward()
    for a, b, both in zip(*(m.parameters() for m in (plain, other, held)), strict=True):
        torch.testing.assert_close(both.grad, a.grad + b.grad)


def test_the_hardest_slots_of_other_samples_are_more_noise_for_npid() -> None:
    plain, hard = (small_method("npid", hard_negatives=count).double() for count in (0, 49))
    plain.load_state_dict(hard.state_dict())
    views = batch(0, torch.float64).views
    f = plain.embed(views)
    old = plain.bank.state_dict()["slots"].clone()
    (base, _), (loss, _) = plain(batch(0, torch.float64)), hard(batch(0, torch.float64))
    more = 0.0
    for row in range(16):  # all 49 other slots, one by one
        for view in f:
            p = torch.exp(old @ view[row] / 0.07 - plain.log_z)
            terms = torch.log(1 - p / (p + 30 / 50))
            more -= (terms.sum() - terms[row]) / 32
    torch.testing.assert_close(loss, base + more)


@pytest.mark.parametrize(("steps", "turns"), [(0, 1), (1, 2), (2, 3), (3, 1)])
def test_pirl_weighs_the_rotated_view_against_the_plain_one_and_keeps_the_plain_one(steps: int, turns: int) -> None:
    method, other = (small_method("pirl", rotated_weight=0.3).double().eval() for _ in range(2))
    method.bank.steps = other.bank.steps = steps
    method.log_z.fill_(2.0)
    plain, second = batch(0, torch.float64).views
    turned = torch.rot90(second, turns, dims=(2, 3))
    f = torch.nn.functional.normalize(other.projection_head(other.backbone(plain)), dim=1)
    g = torch.nn.functional.normalize(other.rotated_head(other.backbone(turned)), dim=1)
    ids, slots = torch.arange(16), other.bank.state_dict()["slots"].clone()
    other.bank.expect(ids, 30)
    _, drawn, _ = other.bank.read()
    loss, _ = method(batch(0, torch.float64))
    assert (method.log_z == 2) == (steps > 0), "Z is estimated at the first step alone"
    is_own = ids[:, None] == drawn[None]
    parts = [nce((e * slots[ids]).sum(1) / 0.07, e @ slots[drawn].T / 0.07, is_own, method.log_z, 50) for e in (f, g)]
    torch.testing.assert_close(loss, 0.7 * parts[0] + 0.3 * parts[1])
    torch.testing.assert_close(method.bank.slots[ids], torch.nn.functional.normalize(0.5 * (slots[ids] + f), dim=1))
