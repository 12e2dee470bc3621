"""A global batch in several forward passes per rank, with exactly the gradient of one pass.

Summing the gradients of micro-batches' losses is wrong for every loss that compares samples with each other. Instead
(GradCache, Gao et al. 2021, arXiv:2101.06983) all samples are embedded without gradient, the loss of the whole batch
gives each embedding its gradient, and a second pass takes those back through the network, one micro-batch at a time:
one more forward pass, the memory of one micro-batch.

BatchNorm would take its statistics over micro-batches, and dropout would draw masks for each of them: other results, so
both are refused.
"""

import inspect
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pipeline import distributed
from pipeline.data.batch import Batch
from pipeline.errors import DeterministicError
from pipeline.methods.base import Method


class AccumulationError(DeterministicError):
    """Several passes would not give the gradient of one."""


def check_accumulation(method: Method, micro_batches: int) -> None:
    """AccumulationError where ``micro_batches`` > 1 would change the result."""
    layers = [name for name, module in method.named_modules() if isinstance(module, _BatchNorm)]
    if micro_batches > 1 and layers:
        raise AccumulationError(
            f"train.micro_batches={micro_batches} would change the statistics of {len(layers)} BatchNorm layers "
            f"({layers[0]}, ...), so the run would differ; what works: train.micro_batches=1 with more workers, or a "
            "model and heads without BatchNorm, e.g. model.name=vit_small_patch16_224 with method.name=moco_v2, or "
            "with method.name=simclr and method.projection_bn=false"
        )
    dropouts = [name for name, module in method.named_modules() if _drops(module)]
    if micro_batches > 1 and dropouts:
        rates = [key for key in inspect.signature(type(method.backbone.net)).parameters if "drop" in key]
        raise AccumulationError(
            f"train.micro_batches={micro_batches} would draw other masks in {len(dropouts)} layers with dropout "
            f"({dropouts[0]}, ...), so the run would differ; what works: train.micro_batches=1 with more workers, or "
            f"model.args with {', '.join(f'{rate}: 0' for rate in rates)}"
        )


def _drops(module: nn.Module) -> bool:
    """Whether it drops at random what it is given: torch's and timm's layers, and timm's models that do it themselves
    (a ResNet's drop_rate)."""
    return (isinstance(module, _DropoutNd) and module.p > 0) or any(
        getattr(module, rate, None) for rate in ("drop_prob", "drop_rate", "prob")
    )


def backward_in_parts(
    method: Method, batch: Batch, micro_batches: int, autocast: AbstractContextManager[None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of this rank's batch; the parameters' gradients, averaged over ranks, are those of one pass.

    Call it instead of forward and backward through DistributedDataParallel, on the bare method. The batch of a rank
    must be a multiple of ``micro_batches``; ``autocast`` surrounds what computes forward.
    """
    parts = list(zip(*(view.chunk(micro_batches) for view in batch.views), strict=True))
    devices = [batch.views[0].device] if batch.views[0].is_cuda else []
    method.begin(batch.sample_ids)
    with torch.random.fork_rng(devices), torch.no_grad(), autocast:  # the second pass draws the same dropout masks
        embedded = [method.embed(list(part)) for part in parts]
    embeddings = [torch.cat(column).requires_grad_() for column in zip(*embedded, strict=True)]
    method.observe(*embeddings)
    with autocast:
        loss, metrics = method.loss(*embeddings)
    loss.backward()
    for index, part in enumerate(parts):
        with autocast:
            embedded_again = method.embed(list(part))
        pulled = [
            (again, whole.grad.chunk(micro_batches)[index])
            for again, whole in zip(embedded_again, embeddings, strict=True)
            if whole.grad is not None  # targets have none
        ]
        torch.autograd.backward([again for again, _ in pulled], [gradient for _, gradient in pulled])
    distributed.average_gradients_(method.parameters())
    return loss.detach(), metrics
