import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from pipeline.evaluate.knn import TEMPERATURE, knn_predict


def clusters(rows: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian clusters: neighbours disagree, so the weights of the votes decide."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(rows, dim, generator=generator), labels


def oracle(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, classes: int, temperature: float = 0.07
) -> NDArray[np.float64]:
    """Votes (Q, C) in float64, one query at a time, around the bank's mean."""
    centre = bank.double().numpy().mean(axis=0)
    rows = bank.double().numpy() - centre
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    votes = np.zeros((len(queries), classes))
    for row, query in enumerate(queries.double().numpy() - centre):
        similarity = unit @ (query / np.linalg.norm(query))
        for neighbour in np.argsort(-similarity)[:k]:
            votes[row, labels[neighbour]] += math.exp((similarity[neighbour] - 1) / temperature)
    return votes


# 1003 rows are no whole number of groups, 640 are; k = 60 is too many for the prefilter, 1003 the whole bank.
@pytest.mark.parametrize("rows", [640, 1003])
@pytest.mark.parametrize("k", [1, 5, 20, 60, 640])
def test_equals_the_float64_oracle(rows: int, k: int) -> None:
    bank, labels = clusters(rows, 24, 7, seed=0)
    queries, _ = clusters(150, 24, 7, seed=1)
    votes = oracle(queries, bank, labels, k, 7)
    predicted = knn_predict(queries, bank, labels, k=k, num_classes=7).numpy()
    np.testing.assert_array_equal(predicted, votes.argmax(axis=1))
    majority = [np.bincount(labels.numpy()).argmax()] * len(queries)
    assert (predicted != majority).any(), "the oracle should not be trivial"


@pytest.mark.parametrize("temperature", [0.005, 0.02, 1.0])
def test_other_temperatures_also_where_weights_leave_float32(temperature: float) -> None:
    bank, labels = clusters(640, 24, 7, seed=0)
    queries, _ = clusters(150, 24, 7, seed=1)
    predicted = knn_predict(queries, bank, labels, k=20, num_classes=7, temperature=temperature)
    votes = oracle(queries, bank, labels, 20, 7, temperature)
    np.testing.assert_array_equal(predicted.numpy(), votes.argmax(axis=1))


def test_equals_scikit_learn_with_the_same_weights() -> None:
    bank, labels = clusters(2000, 16, 5, seed=2)
    queries, _ = clusters(300, 16, 5, seed=3)
    peer = KNeighborsClassifier(
        n_neighbors=20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    ).fit(bank.numpy(), labels.numpy())
    predicted = knn_predict(queries, bank, labels, k=20, num_classes=5, centred=False)
    np.testing.assert_array_equal(predicted.numpy(), peer.predict(queries.numpy()))


def test_what_all_rows_share_does_not_matter() -> None:
    """A white background, or a direction that all embeddings have: cosines of the rows as they are drown in it."""
    bank, labels = clusters(1003, 24, 7, seed=0)
    queries, _ = clusters(400, 24, 7, seed=1)
    offset = torch.full((24,), 64.0)
    alone = knn_predict(queries, bank, labels, k=20, num_classes=7)
    shifted = knn_predict(queries + offset, bank + offset, labels, k=20, num_classes=7)
    assert (alone == shifted).float().mean() > 0.99  # float32 has lost some digits of what is left
    as_they_are = knn_predict(queries + offset, bank + offset, labels, k=20, num_classes=7, centred=False)
    assert (as_they_are == alone).float().mean() < 0.98


@pytest.mark.parametrize(("query_block", "bank_block"), [(1, 1), (7, 16), (64, 160), (1000, 333), (1000, 100_000)])
def test_blocks_do_not_change_the_result(query_block: int, bank_block: int) -> None:
    bank, labels = clusters(1003, 24, 7, seed=0)
    queries, _ = clusters(100, 24, 7, seed=1)
    blocked = knn_predict(queries, bank, labels, k=9, num_classes=7, query_block=query_block, bank_block=bank_block)
    np.testing.assert_array_equal(blocked.numpy(), oracle(queries, bank, labels, 9, 7).argmax(axis=1))


def test_the_closer_neighbour_outvotes_two_farther_ones() -> None:
    # cos 0.99 weighs exp(0.99 / 0.07), 3.5x as much as cos 0.90: more than two of those together.
    angle = torch.tensor([0.99, 0.90, 0.90]).acos()
    bank = torch.stack([angle.cos(), angle.sin() * torch.tensor([1.0, 1.0, -1.0])], dim=1)
    predicted = knn_predict(
        torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1, 1]), k=3, num_classes=2, centred=False
    )
    assert predicted.tolist() == [0]


def test_rows_may_be_uint8_and_around_their_centre_have_any_length() -> None:
    generator = torch.Generator().manual_seed(4)
    bank = torch.randint(256, (500, 48), generator=generator, dtype=torch.uint8)
    queries = torch.randint(256, (40, 48), generator=generator, dtype=torch.uint8)
    labels = torch.arange(500) % 3
    expected = oracle(queries, bank, labels, 5, 3).argmax(axis=1)
    np.testing.assert_array_equal(knn_predict(queries, bank, labels, k=5, num_classes=3).numpy(), expected)
    scaled = bank.float() * torch.rand(500, 1, generator=generator).add(0.1)
    of_both = [knn_predict(queries, x, labels, k=5, num_classes=3, centred=False).numpy() for x in (bank, scaled)]
    np.testing.assert_array_equal(*of_both)


@pytest.mark.parametrize("k", [0, 11])
def test_k_outside_the_bank_names_what_works(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} .*1 to 10 work"):
        knn_predict(torch.ones(1, 2), torch.ones(10, 2), torch.zeros(10, dtype=torch.int64), k=k, num_classes=1)
