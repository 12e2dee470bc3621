import math

import pytest
import torch

from pipeline.evaluate.diagnostics import alignment, embedding_std, rank_me, uniformity


def test_orthonormal_features() -> None:
    """One row per axis: unit std after scaling, full rank, all squared distances 2."""
    features = 5 * torch.eye(64)  # lengths don't matter
    assert float(embedding_std(features)) == pytest.approx(1, rel=1e-5)
    assert float(rank_me(features)) == pytest.approx(64, rel=1e-9)
    assert float(uniformity(features)) == pytest.approx(-4, rel=1e-5)


def test_collapse_to_a_point() -> None:
    features = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).expand(300, -1)
    assert float(embedding_std(features)) == pytest.approx(0, abs=1e-5)
    assert float(rank_me(features)) == pytest.approx(1, abs=1e-4)
    assert float(uniformity(features)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)])
def test_rank_me_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, shape[1])
    singular = torch.linalg.svdvals(features)
    p = singular / singular.sum()
    assert float(rank_me(features)) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)


def test_rank_me_counts_equal_directions() -> None:
    """Orthogonal directions with equal energy count one each; with energies 3:1 in singular value, by the entropy."""
    q, _ = torch.linalg.qr(torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    basis = torch.eye(7, 50, dtype=torch.float64)
    assert float(rank_me(q @ basis)) == pytest.approx(7, rel=1e-5)
    two = q[:, :2] @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ basis[:2]
    assert float(rank_me(two)) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-5)


def test_alignment_of_equal_orthogonal_and_opposite_pairs() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert float(alignment(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert float(alignment(x, x.flip(0))) == pytest.approx(2)
    assert float(alignment(x, -x)) == pytest.approx(4)


def test_uniformity_by_definition_in_any_blocks() -> None:
    features = torch.randn(101, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = float(torch.pdist(unit).square().mul(-2).exp().mean().log())
    for block in (1, 7, 100, 101, 4096):
        assert float(uniformity(features, block=block)) == pytest.approx(expected, rel=1e-5)
