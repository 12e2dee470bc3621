"""NCE against the paper's formulas written out, query by query, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.losses.nce import chance, log_normalizer, nce

N = 500


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_paper_written_out(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, slots = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (5, 5 + 40))
    query.requires_grad_()
    f, slots = F.normalize(query, dim=1), F.normalize(slots, dim=1)
    noise_ids = torch.cat([torch.arange(5, 43), torch.tensor([1, 3])])  # two draws hit a query's own slot
    is_own = torch.arange(5)[:, None] == noise_ids[None]
    own, noise = (f * slots[:5]).sum(1) / temperature, f @ slots[noise_ids].T / temperature

    values = [math.exp(v) for row in range(5) for v in [*noise[row][~is_own[row]].tolist(), own[row].item()]]
    z = N * sum(values) / len(values)
    total, count = log_normalizer(own, noise, is_own)
    log_z = (total / count).log() + math.log(N)
    assert log_z.item() == pytest.approx(math.log(z), rel=1e-12)

    expected = torch.zeros((), dtype=torch.float64)
    for row in range(5):
        p = torch.exp(own[row]) / z
        expected = expected - torch.log(p / (p + 40 / N))
        for column in range(40):
            if noise_ids[column] != row:
                p = torch.exp(noise[row, column]) / z
                expected = expected - torch.log(1 - p / (p + 40 / N))
    actual = nce(own, noise, is_own, log_z, N)
    torch.testing.assert_close(actual, expected / 5, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, query, retain_graph=True)[0] for loss in (actual, expected / 5)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_chance_is_the_loss_of_uniform_probabilities() -> None:
    logits = torch.zeros(3, 41, dtype=torch.float64)
    own, noise = logits[:, 0], logits[:, 1:]
    loss = nce(own, noise, torch.zeros(3, 40, dtype=torch.bool), torch.tensor(math.log(N)), N)
    assert loss.item() == pytest.approx(chance(40), rel=1e-12)
