"""The guard sees a collapse, acts on all ranks together, and stops a non-finite loss before the update."""

import logging
import pickle

import pytest
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.collapse import CollapseError, NonFiniteLossError, act_on_collapse, diagnose, stop_unless_finite
from pipeline.evaluate.diagnostics import alignment, embedding_std, rank_me, uniformity
from tests import gloo


def _embeddings(collapsed: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 64, 16, generator=generator)
    if collapsed:
        return 1 + 1e-4 * first, 1 + 1e-4 * noise
    return first, first + 0.1 * noise


def test_healthy_embeddings_pass_and_collapsed_ones_do_not() -> None:
    healthy, collapsed = diagnose(*_embeddings(False)), diagnose(*_embeddings(True))
    assert 0.8 < healthy["embedding/std"] < 1.2
    assert collapsed["embedding/std"] < 1e-3
    act_on_collapse(healthy, 1, "stop")
    with pytest.raises(CollapseError, match=r"collapsed at step 7: .* below 0.01 .*train.on_collapse=warn"):
        act_on_collapse(collapsed, 7, "stop")


def test_the_warning_policy_warns_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        act_on_collapse(diagnose(*_embeddings(True)), 7, "warn")
    assert "collapsed at step 7" in caplog.text


def test_the_diagnosis_is_that_of_the_evaluation() -> None:
    first, second = _embeddings(False)
    diagnosis = diagnose(first, second)
    assert diagnosis["embedding/std"] == embedding_std(first)
    assert diagnosis["embedding/rank_me"] == rank_me(first)
    assert diagnosis["embedding/alignment"] == alignment(first, second)
    assert diagnosis["embedding/uniformity"] == uniformity(first)


def _on_rank() -> tuple[dict[str, Tensor], str, list[int]]:
    rank, world = distributed.rank(), distributed.world_size()
    diagnosis = diagnose(*(e.chunk(world)[rank] for e in _embeddings(True)))
    with pytest.raises(CollapseError) as collapse:
        act_on_collapse(diagnosis, 3, "stop")
    loss = torch.tensor(float("nan") if rank == 1 else 1.0)
    with pytest.raises(NonFiniteLossError) as error:
        stop_unless_finite(loss, torch.arange(2) + 10 * rank)
    return diagnosis, str(collapse.value), error.value.sample_ids


def test_all_ranks_decide_alike_even_if_only_one_has_seen_it() -> None:
    expected = diagnose(*_embeddings(True))
    (first, first_message, first_ids), (second, second_message, second_ids) = gloo.run(2, _on_rank)
    assert first == second == expected
    assert first_message == second_message
    assert first_ids == second_ids == [0, 1, 10, 11]


def test_a_finite_loss_passes() -> None:
    stop_unless_finite(torch.tensor(2.0), torch.arange(2))


def test_the_error_travels_between_processes_with_its_samples() -> None:
    """Ray pickles it on its way to the driver."""
    error = pickle.loads(pickle.dumps(NonFiniteLossError("step 3: not finite", [1, 2])))
    assert (str(error), error.sample_ids) == ("step 3: not finite", [1, 2])
