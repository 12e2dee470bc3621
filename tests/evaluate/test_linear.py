import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluate.linear import LinearProbe, fit_linear_probe


def data(rows: int, seed: int, dim: int = 40, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Overlapping classes; features of very different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, dim, generator=fixed)
    spread = torch.logspace(-2, 2, dim)
    offset = 10 * torch.randn(dim, generator=fixed)
    labels = torch.randint(classes, (rows,), generator=generator)
    return (centres[labels] + 2 * torch.randn(rows, dim, generator=generator)) * spread + offset, labels


def fit(features: Tensor, labels: Tensor, l2: list[float], iterations: int = 300, classes: int = 6) -> LinearProbe:
    return fit_linear_probe(features, labels, num_classes=classes, l2=l2, holdout=0.25, iterations=iterations, seed=0)


def objective(logits: Tensor, labels: Tensor, standardised_weight: Tensor, l2: float) -> float:
    return float(F.cross_entropy(logits.double(), labels) + l2 / 2 * standardised_weight.double().square().sum())


@pytest.mark.parametrize("l2", [1.0, 1e-1, 1e-2, 1e-3])
def test_reaches_scikit_learns_optimum(l2: float) -> None:
    features, labels = data(1200, seed=0)
    held, _ = data(1000, seed=1)
    scaler = StandardScaler().fit(features.double().numpy())
    x = scaler.transform(features.double().numpy())
    peer = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10_000).fit(x, labels.numpy())
    best = objective(torch.from_numpy(peer.decision_function(x)), labels, torch.from_numpy(peer.coef_), l2)

    probe = fit(features, labels, [l2])
    reached = objective(probe.logits(features), labels, probe.weight, l2)
    assert best - 1e-6 < reached < best * (1 + 1e-4)
    agree = probe.predict(held).numpy() == peer.predict(scaler.transform(held.double().numpy()))
    assert agree.mean() > 0.99


def test_copies_of_a_feature_are_solved_exactly() -> None:
    """The full objective over 3 copies of some columns and 2 of others, against scikit-learn, which sees them all."""
    features, labels = data(600, seed=0, dim=12)
    features = torch.cat([features, features[:, :8], features[:, :4]], dim=1)
    x = StandardScaler().fit_transform(features.double().numpy())
    l2 = 0.05
    peer = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=10_000).fit(x, labels.numpy())
    probe = fit(features, labels, [l2])
    np.testing.assert_allclose(probe.weight.numpy(), (peer.coef_ - peer.coef_.mean(0)).T, atol=2e-3)
    torch.testing.assert_close(probe.weight[:4], probe.weight[12:16])
    best = objective(torch.from_numpy(peer.decision_function(x)), labels, torch.from_numpy(peer.coef_), l2)
    assert objective(probe.logits(features), labels, probe.weight, l2) < best * (1 + 1e-5)


def test_l2_is_chosen_on_held_out_rows() -> None:
    """60 rows in 40 dimensions overfit: the weakest penalty fits the train rows best, and must not be chosen."""
    features, labels = data(60, seed=0)
    held, held_labels = data(2000, seed=1)
    chosen = fit(features, labels, [1e-6, 1.0])
    weak, strong = fit(features, labels, [1e-6]), fit(features, labels, [1.0])
    assert (weak.predict(features) == labels).float().mean() > (strong.predict(features) == labels).float().mean()
    assert (strong.predict(held) == held_labels).float().mean() > (weak.predict(held) == held_labels).float().mean()
    assert chosen.l2 == 1.0
    torch.testing.assert_close(chosen.weight, strong.weight)


def test_constant_features_and_a_collapse_are_harmless() -> None:
    features, labels = data(500, seed=0)
    constant = torch.cat([features, torch.full((500, 2), 3.1)], dim=1)
    probe = fit(constant, labels, [0.01])
    assert (probe.weight[-2:] == 0).all()
    torch.testing.assert_close(
        probe.logits(constant), fit(features, labels, [0.01]).logits(features), rtol=0, atol=1e-4
    )

    noise = 1 + 1e-7 * torch.randn(
        500, 30, generator=torch.Generator().manual_seed(0)
    )  # float32 rounding of a constant
    collapsed = fit(noise, labels, [0.01, 0.1])
    assert collapsed.predict(noise).unique().tolist() == [int(labels.mode().values)]


def test_more_features_than_rows() -> None:
    features, labels = data(50, seed=0, dim=200)
    probe = fit(features, labels, [1e-3])
    assert (probe.predict(features) == labels).all()


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="1 train rows; the probe needs 2 or more"):
        fit(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), [0.1])
