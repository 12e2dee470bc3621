"""Mixtures against the paper's two formulas, query by query, and their place in the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.losses.infonce import info_nce
from pipeline.losses.mochi import Draws, MochiConfig, mixtures

CONFIG = MochiConfig(hardest=6, mixed=5, with_query=3)


def _rows(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("exclude", [False, True])
def test_mixtures_are_those_of_the_paper(exclude: bool) -> None:
    query, negatives = _rows(4, 0), _rows(30, 1)
    own = torch.arange(30)[None] % 10 == torch.arange(4)[:, None] if exclude else None
    draws = Draws.of(CONFIG, 4, seed=3)
    actual = mixtures(query, negatives, own, CONFIG.hardest, draws)
    assert actual.shape == (4, 8, 8)
    for b in range(4):
        allowed = [k for k in range(30) if own is None or not own[b, k]]
        hard = sorted(allowed, key=lambda k: -float(query[b] @ negatives[k]))[:6]
        for m in range(5):
            i, j = (negatives[hard[n]] for n in draws.pairs[b, m])
            h = draws.shares[b, m] * i + (1 - draws.shares[b, m]) * j
            torch.testing.assert_close(actual[b, m], h / h.norm())
        for m in range(3):
            h = (
                draws.query_shares[b, m] * query[b]
                + (1 - draws.query_shares[b, m]) * negatives[hard[draws.singles[b, m]]]
            )
            torch.testing.assert_close(actual[b, 5 + m], h / h.norm())


def test_own_keys_are_not_mixed_where_others_are_fewer_than_the_hardest() -> None:
    negatives = torch.eye(8, dtype=torch.float64)
    own = torch.arange(8)[None] >= 3  # three others for a query that asks for six
    synthetic = mixtures(negatives[7:], negatives, own, CONFIG.hardest, Draws.of(CONFIG, 1, seed=3))
    of_pairs, with_query = synthetic[0].split([5, 3])
    assert (of_pairs[:, 3:] == 0).all()
    assert (with_query[:, 3:7] == 0).all()


def test_draws_cover_their_ranges_and_repeat() -> None:
    config = MochiConfig(hardest=4, mixed=200, with_query=200)
    draws = Draws.of(config, 20, seed=1)
    assert draws.pairs.unique().tolist() == draws.singles.unique().tolist() == [0, 1, 2, 3]
    assert 0 <= draws.shares.min() < 0.01
    assert 0.99 < draws.shares.max() < 1
    assert 0.49 < draws.query_shares.max() < 0.5
    assert torch.equal(Draws.of(config, 20, seed=1).shares, draws.shares)
    assert not torch.equal(Draws.of(config, 20, seed=2).shares, draws.shares)
    part = draws.rows(slice(5, 10), torch.device("cpu"))
    assert torch.equal(part.pairs, draws.pairs[5:10])


def test_mixtures_are_more_negatives_of_their_query_and_constants() -> None:
    query, positive, negatives = _rows(4, 0).requires_grad_(), _rows(4, 2), _rows(30, 1)
    synthetic = mixtures(query.detach(), negatives, None, CONFIG.hardest, Draws.of(CONFIG, 4, seed=3))
    loss = info_nce(query, positive, negatives, 0.2, synthetic=synthetic)
    logits = [torch.cat([positive[b : b + 1], negatives, synthetic[b]]) @ query[b] / 0.2 for b in range(4)]
    expected = F.cross_entropy(torch.stack(logits), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, query)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
