"""What a representation looks like without labels: has it collapsed, how many directions does it use?

None of these ranks encoders by itself (a random projection has a high rank, too); they explain the kNN number
and show a collapse that the loss hides.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding_std(features: Tensor) -> Tensor:
    """Mean over dimensions of the std of L2-normalised features (N, D), times sqrt(D); a scalar.

    Chen & He 2021 (arXiv:2011.10566, figure 2): 1 for directions spread evenly over the sphere, 0 after a
    collapse to one point. N >= 2.
    """
    return F.normalize(features.float(), dim=1).std(dim=0).mean() * features.shape[1] ** 0.5


def rank_me(features: Tensor) -> Tensor:
    """The effective rank of (N, D): exp of the entropy of the normalised singular values; a scalar >= 1.

    Garrido et al. 2023 (arXiv:2210.02885); needs N > D to be able to reach D. Computed from the smaller Gram
    matrix in float64 on the CPU: float32 would add about 3e-4 of the largest singular value to each of the
    others, and MPS has no float64.
    """
    x = features.detach().to("cpu", torch.float64)
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(p).sum().exp()


def alignment(features: Tensor, positives: Tensor) -> Tensor:
    """Mean squared distance of positive pairs on the unit sphere, both (N, D); a scalar in [0, 4].

    Wang & Isola 2020 (arXiv:2005.10242), alpha = 2. 0 is perfect invariance, and also what a collapse gives.
    """
    a, b = F.normalize(features.float(), dim=1), F.normalize(positives.float(), dim=1)
    return (a - b).square().sum(dim=1).mean()


def uniformity(features: Tensor, *, block: int = 1024) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different rows on the unit sphere; a scalar.

    Wang & Isola 2020 (arXiv:2005.10242), t = 2. 0 after a collapse, about -4 (never below -8) when spread
    evenly in many dimensions. (N, D) with N >= 2; ``block`` rows at a time, so memory is block x N.
    """
    x = F.normalize(features.float(), dim=1)
    n = len(x)
    total = x.new_zeros(())
    for start in range(0, n, block):
        rows = x[start : start + block]
        # |x - y|^2 = 2 - 2 x.y; rounding may push x.y above 1
        potential = (4 * (rows @ x.T).clamp(max=1) - 4).exp()
        total += potential.sum() - potential.diagonal(start).sum()
    return (total / (n * (n - 1))).log()
