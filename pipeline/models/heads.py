"""Projection and prediction heads: small MLPs with BatchNorm, as each paper draws them."""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn


def mlp(
    widths: Sequence[int],
    *,
    hidden_bn: bool = True,
    last_bn: Literal["none", "affine", "scale", "plain"] = "none",
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear (-> BatchNorm) -> ReLU for each hidden width, and a last Linear: (B, widths[0]) -> (B, widths[-1]).

    Args:
        hidden_bn: BatchNorm after the hidden layers, which then have no bias of their own.
        last_bn: BatchNorm after the last layer, with scale and shift ("affine"), with scale alone
            ("scale", SimCLR), with neither ("plain": affine=False, MoCo v3 and SimSiam), or none.
        last_bias: bias of the last Linear, where no BatchNorm follows it.
    """
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(width_in, width_out, bias=not hidden_bn))
        if hidden_bn:
            layers.append(nn.BatchNorm1d(width_out))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias and last_bn == "none"))
    if last_bn != "none":
        bn = nn.BatchNorm1d(widths[-1], affine=last_bn != "plain")
        if last_bn == "scale":
            bn.bias.requires_grad_(False)  # stays at its initial 0
        layers.append(bn)
    return nn.Sequential(*layers)
