"""Collectives and global BN against one process on the concatenated batch, in float64."""

import copy

import pytest
import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from pipeline import distributed
from tests import gloo


def _rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_without_a_process_group_every_collective_is_the_identity() -> None:
    x = _rows(0, 3, 2).requires_grad_()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for collective in (distributed.all_gather, distributed.all_gather_grad, distributed.all_reduce_sum_grad):
        torch.testing.assert_close(collective(x), x, check_stride=False)
    torch.testing.assert_close(distributed.all_reduce_mean(x), x.detach())
    assert torch.equal(distributed.all_gather_ragged(x), x)
    model = nn.Sequential(nn.BatchNorm1d(2))
    assert distributed.convert_global_bn(model) is model
    assert type(model[0]) is nn.BatchNorm1d


def _gather_loss(x: Tensor) -> Tensor:
    """A loss in which every row meets every other: mean over rows of log-sum-exp of the similarities."""
    return torch.logsumexp(x @ distributed.all_gather_grad(x).T, dim=1).mean()


def _gather_on_rank() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rank, world = distributed.rank(), distributed.world_size()
    x = _rows(1, 8, 3).chunk(world)[rank].clone().requires_grad_()
    loss = _gather_loss(x)
    loss.backward()
    total = distributed.all_reduce_sum_grad(x.detach().sum(0).requires_grad_())
    assert x.grad is not None
    return distributed.all_gather(x), x.grad / world, distributed.all_reduce_mean(loss), total.detach()


@pytest.mark.parametrize("world", [2, 4])
def test_gather_and_its_summed_gradient_equal_one_process(world: int) -> None:
    x = _rows(1, 8, 3).requires_grad_()
    loss = _gather_loss(x)
    loss.backward()
    results = gloo.run(world, _gather_on_rank)
    for gathered, _, mean_loss, total in results:
        torch.testing.assert_close(gathered, x.detach())
        torch.testing.assert_close(mean_loss, loss.detach())
        torch.testing.assert_close(total, x.detach().sum(0))
    torch.testing.assert_close(torch.cat([grad for _, grad, _, _ in results]), x.grad)


def _ragged_on_rank(counts: list[int]) -> Tensor:
    start = sum(counts[: distributed.rank()])
    return distributed.all_gather_ragged(_rows(5, 8, 3)[start : start + counts[distributed.rank()]])


@pytest.mark.parametrize("counts", [[3, 5], [0, 4], [0, 0], [2, 0, 5, 1]])
def test_a_ragged_gather_puts_the_rows_of_all_ranks_in_order(counts: list[int]) -> None:
    for gathered in gloo.run(len(counts), _ragged_on_rank, counts):
        assert torch.equal(gathered, _rows(5, 8, 3)[: sum(counts)])


def _replicated_loss(x: Tensor) -> Tensor:
    return distributed.all_reduce_sum_grad(x.T @ x).square().sum().sqrt()


def _replicated_on_rank() -> Tensor:
    x = _rows(2, 8, 3).chunk(distributed.world_size())[distributed.rank()].clone().requires_grad_()
    _replicated_loss(x).backward()
    assert x.grad is not None
    return x.grad / distributed.world_size()


def test_a_replicated_loss_of_a_sum_over_ranks_has_the_gradient_of_one_process() -> None:
    x = _rows(2, 8, 3).requires_grad_()
    _replicated_loss(x).backward()
    torch.testing.assert_close(torch.cat(gloo.run(2, _replicated_on_rank)), x.grad)


class _Net(nn.Module):
    """Every kind of BatchNorm: timm's with activation, 2-D, 1-D, cumulative statistics, without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(3, 8, 3, stride=2)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Sequential(
            nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.BatchNorm1d(8, affine=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return _Net().double()


LR = 0.01
SIZES = {2: [5, 3], 4: [2, 3, 1, 2]}  # uneven on purpose, with a lone sample
INPUT = (8, 3, 16, 16)


def _bn_on_rank(steps: int) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    rank, world = distributed.rank(), distributed.world_size()
    model = distributed.convert_global_bn(_net())
    assert not [m for m in model.modules() if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    ddp = distributed.data_parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        output = ddp(_rows(step, *INPUT).split(SIZES[world])[rank])
        # DDP divides by W; the sum over all samples / 8 is the single-process mean
        (world * output.square().sum() / 8).backward()
        optimizer.step()
        outputs.append(output.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        return outputs, gradients, model.state_dict(), model(_rows(99, *INPUT))


@pytest.mark.parametrize("world", [2, 4])
def test_global_bn_equals_one_process_on_the_concatenated_batch(world: int) -> None:
    steps = 3
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    expected = []
    for step in range(steps):
        optimizer.zero_grad()
        output = model(_rows(step, *INPUT))
        (output.square().sum() / 8).backward()
        optimizer.step()
        expected.append(output.detach())
    model.eval()
    results = gloo.run(world, _bn_on_rank, steps)
    for step in range(steps):
        together = torch.cat([outputs[step] for outputs, _, _, _ in results])
        torch.testing.assert_close(together, expected[step], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        expected_eval = model(_rows(99, *INPUT))
    state = model.state_dict()
    for _, gradients, rank_state, evaluated in results:
        assert rank_state.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(rank_state[name], value, rtol=1e-8, atol=1e-9, msg=name)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-8, msg=name)
        torch.testing.assert_close(evaluated, expected_eval, rtol=1e-8, atol=1e-9)


def _far_mean_on_rank() -> Tensor:
    bn = distributed.convert_global_bn(nn.BatchNorm1d(4))
    x = (1e4 + _rows(3, 64, 4)).float().chunk(distributed.world_size())[distributed.rank()]
    return bn(x).detach()


def test_global_bn_keeps_its_digits_far_from_zero() -> None:
    """Sums of squares in float32 would leave nothing of a variance of 1 at a mean of 1e4."""
    expected = nn.BatchNorm1d(4).double()((1e4 + _rows(3, 64, 4)).float().double())
    actual = torch.cat(gloo.run(2, _far_mean_on_rank)).double()
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=5e-3)


def _grouped_on_rank() -> Tensor:
    bn = distributed.convert_global_bn(nn.BatchNorm1d(3).double(), ranks_per_group=2)
    return bn(_rows(4, 8, 3).chunk(4)[distributed.rank()]).detach()


def test_grouped_bn_takes_statistics_over_each_group_of_ranks() -> None:
    actual = torch.cat(gloo.run(4, _grouped_on_rank))
    expected = torch.cat([nn.BatchNorm1d(3).double()(half) for half in _rows(4, 8, 3).chunk(2)])
    torch.testing.assert_close(actual, expected.detach())
    assert not torch.allclose(actual, nn.BatchNorm1d(3).double()(_rows(4, 8, 3)))


def _bad_group_on_rank() -> str:
    with pytest.raises(ValueError, match=r"groups of 3 ranks does not fit 4 ranks; sizes that fit: 1, 2, 4") as error:
        distributed.convert_global_bn(nn.BatchNorm1d(3), ranks_per_group=3)
    return str(error.value)


def test_a_group_size_that_does_not_fit_is_an_error_that_teaches() -> None:
    assert len(gloo.run(4, _bad_group_on_rank)) == 4


def _copy_on_rank() -> bool:
    bn = distributed.convert_global_bn(nn.Sequential(nn.BatchNorm1d(3)))
    return copy.deepcopy(bn)[0].weight.equal(bn[0].weight)


def test_a_converted_module_can_be_copied() -> None:
    assert all(gloo.run(2, _copy_on_rank))


def _bf16_on_rank() -> tuple[Tensor, Tensor]:
    bn = distributed.convert_global_bn(nn.BatchNorm2d(4))
    x = _rows(5, 8, 4, 6, 6).bfloat16().chunk(distributed.world_size())[distributed.rank()]
    return bn(x).detach(), bn.running_var


def test_global_bn_of_bf16_activations_keeps_float32_statistics() -> None:
    bn = nn.BatchNorm2d(4)
    expected = bn(_rows(5, 8, 4, 6, 6).bfloat16()).detach()
    results = gloo.run(2, _bf16_on_rank)
    actual = torch.cat([output for output, _ in results])
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(results[0][1], bn.running_var, rtol=1e-5, atol=0)


def test_rank_0_broadcasts_its_integer() -> None:
    assert gloo.run(2, _broadcast_on_rank) == [41, 41]


def _broadcast_on_rank() -> int:
    return distributed.broadcast_int(41 + distributed.rank())


def test_a_failing_rank_is_reported_and_the_pool_recovers() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        gloo.run(2, _divide_on_rank)
    assert gloo.run(2, distributed.rank) == [0, 1]


def _divide_on_rank() -> float:
    return 1 / 0
