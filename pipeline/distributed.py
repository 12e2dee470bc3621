"""Collectives with the right gradients, and BatchNorm over the global batch. Everything works without a process group.

The rule for gradients: the backward of a collective SUMS over ranks. Each rank then returns the mean over its own
anchors (or the full loss), and DistributedDataParallel's mean over ranks is the gradient of one process on the global
batch. A gather without gradient has an identical loss and a gradient that is 0.45 too small at 4 ranks.

Global BN (statistics over all ranks) uses ``torch.nn.SyncBatchNorm`` on CUDA; torch has none for the CPU, so
``GlobalBatchNorm`` is one: an all-gather of (mean, variance, count) forward, one all-reduce backward.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def all_gather(x: Tensor) -> Tensor:
    """(B, ...) -> (W*B, ...) in rank order, without gradient. B must be the same on all ranks."""
    if not is_distributed():
        return x.detach()
    gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.detach().contiguous())
    return gathered


def all_gather_ragged(x: Tensor) -> Tensor:
    """(b, ...) -> (sum of b, ...) in rank order, without gradient; ranks may have different b, also none."""
    counts = all_gather(torch.tensor([x.shape[0]], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x.detach()
    return torch.cat([part[:count] for part, count in zip(all_gather(padded[None]), counts, strict=True)])


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    total = x.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """(W*B, ...) -> (B, ...): this rank's rows of the sum over ranks, without gradient."""
    if not is_distributed():
        return x.detach()
    local = x.new_empty(x.shape[0] // world_size(), *x.shape[1:])
    dist.reduce_scatter_tensor(local, x.detach().contiguous())
    return local


def all_gather_grad(x: Tensor) -> Tensor:
    """(B, ...) -> (W*B, ...) in rank order; the backward sums each row's gradient over the ranks."""
    return _AllGather.apply(x) if is_distributed() else x


def all_reduce_sum_grad(x: Tensor) -> Tensor:
    """The sum over ranks; the backward sums the gradient over ranks too, so a loss of the sum may be replicated."""
    return _AllReduceSum.apply(x) if is_distributed() else x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over ranks, without gradient. Stack several scalars first: one call costs what ten do."""
    return all_reduce_sum(x) / world_size()


def any_rank(flag: Tensor) -> bool:
    """Whether the boolean scalar ``flag`` is set on some rank; the same answer on all ranks, which wait for it."""
    raised = flag.float()
    if is_distributed():
        dist.all_reduce(raised)
    return bool(raised.item())


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient <- its mean over ranks, in one collective; for a backward outside DistributedDataParallel."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if is_distributed() and gradients:
        mean = all_reduce_mean(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def broadcast_int(value: int) -> int:
    """Rank 0's value, on every rank."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_items(mine: Sequence[T]) -> list[T]:
    """The ranks' items one after the other, on every rank; they are pickled, so not in every step (1.5 ms on gloo)."""
    parts: list[Sequence[T]] = [mine] * world_size()
    if is_distributed():
        dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def data_parallel(module: nn.Module) -> nn.Module:
    """``module`` with its gradients averaged over ranks; ``module`` itself without a process group.

    Buffers are not broadcast each step: global BN and queues compute equal ones on all ranks.
    """
    if not is_distributed():
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_scatter_sum(grad)


class _AllReduceSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


# --- BatchNorm over the global batch ---------------------------------------------------------------------------------


def convert_global_bn(module: M, ranks_per_group: int | None = None) -> M:
    """``module`` with every BatchNorm replaced by one over the global batch; state-dict keys stay the same.

    Convert after the whole method is built and moved to its device, before DistributedDataParallel (with
    ``broadcast_buffers=False``: the statistics agree already). Without a process group nothing changes.

    Args:
        ranks_per_group: statistics over groups of so many consecutive ranks; None = over all ranks.

    Raises:
        ValueError: the world size is not a multiple of ``ranks_per_group``.
    """
    group_size = world_size() if ranks_per_group is None else ranks_per_group
    if group_size < 1 or world_size() % group_size:
        fits = ", ".join(str(n) for n in range(1, world_size() + 1) if world_size() % n == 0)
        raise ValueError(
            f"BatchNorm over groups of {group_size} ranks does not fit {world_size()} ranks; sizes that fit: {fits}"
        )
    if group_size == 1:
        return module
    if any(p.is_cuda for p in module.parameters()):
        return cast(M, convert_sync_batchnorm(module, _bn_group(group_size)))
    return cast(M, _convert(module, group_size))


def _convert(module: nn.Module, group_size: int) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm.like(module, group_size)
    for name, child in module.named_children():
        setattr(module, name, _convert(child, group_size))
    return module


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm1d/2d/3d, or timm's BatchNormAct2d, whose training statistics are those of all ranks' batches together.

    Forward, backward and running statistics equal one process on the concatenated batch, for batches of different
    sizes too. The gradients of weight and bias stay local, as DistributedDataParallel averages them.
    """

    group_size: int
    drop: nn.Module | None
    act: nn.Module | None

    @classmethod
    def like(cls, bn: _BatchNorm, group_size: int) -> "GlobalBatchNorm":
        """The same layer, sharing parameters and buffers. timm's dropout and activation come along."""
        new = cls(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
        new.weight, new.bias = bn.weight, bn.bias
        new.running_mean, new.running_var = bn.running_mean, bn.running_var
        new.num_batches_tracked = bn.num_batches_tracked
        new.drop, new.act = (bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else (None, None)
        new.group_size = group_size
        return new.train(bn.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got a tensor of shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        if self.training and is_distributed():
            self._check_input_dim(input)
            output = self._normalize_globally(input)
        else:
            output = super().forward(input)
        if self.drop is not None and self.act is not None:
            output = self.act(self.drop(output))
        return output

    @torch.compiler.disable
    def _normalize_globally(self, input: Tensor) -> Tensor:
        output, mean, var, count = _GlobalBatchNorm.apply(
            input, self.weight, self.bias, self.eps, _bn_group(self.group_size)
        )
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return output


class _GlobalBatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # update_stats gives mean and biased variance 5-50x faster than torch.var_mean on the CPU; without
        # float32 statistics to update (here: discarded) it would round those of a bf16 input to bf16
        channels = x.shape[1]
        unused = x.new_zeros(channels, dtype=torch.promote_types(x.dtype, torch.float32))
        local_mean, local_var = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)
        packed = torch.cat([local_mean, local_var, unused.new_tensor([x.numel() // channels])])[None]
        gathered = packed.new_empty(dist.get_world_size(group), packed.shape[1])
        dist.all_gather_into_tensor(gathered, packed, group=group)
        means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
        # Chan's merge; sums of squares would lose the digits that a mean far from zero needs
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        output, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group, ctx.total = eps, group, total
        ctx.mark_non_differentiable(mean, var, total)
        return output, mean, var, total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, sum_grad_xhat, sum_grad = torch.ops.aten.native_batch_norm_backward(
            grad_output, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([sum_grad, sum_grad_xhat]).to(mean.dtype)
        dist.all_reduce(sums, group=ctx.group)
        # grad_x so far takes the statistics as constants; they depend on x, which subtracts
        # w * invstd * (mean(g) + xhat * mean(g * xhat))
        invstd = torch.rsqrt(var + ctx.eps)
        scale = invstd if weight is None else invstd * weight
        mean_grad, mean_grad_xhat = sums / ctx.total
        slope = -scale * invstd * mean_grad_xhat
        offset = -scale * mean_grad - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x = grad_x.addcmul(x, slope.to(x.dtype).view(shape)).add_(offset.to(x.dtype).view(shape))
        if weight is None:
            return grad_x, None, None, None, None
        return grad_x, sum_grad_xhat, sum_grad, None, None


_BN_GROUPS: dict[tuple[Any, int], dist.ProcessGroup] = {}


def _bn_group(group_size: int) -> dist.ProcessGroup:
    """This rank's group for BN; never the default one, where DDP's buckets are in flight during the backward."""
    key = (dist.group.WORLD, group_size)
    if key not in _BN_GROUPS:
        groups = [list(range(start, start + group_size)) for start in range(0, dist.get_world_size(), group_size)]
        own, _ = dist.new_subgroups_by_enumeration(groups)
        _BN_GROUPS[key] = cast(dist.ProcessGroup, own)
    return _BN_GROUPS[key]
