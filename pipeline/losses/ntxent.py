"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, equation 1), over the global batch.

This is the paper's mean over all 2N anchors; the released TensorFlow code sums two means and is twice as large.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import distributed


def ntxent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The mean cross-entropy of each local anchor against all 2N - 1 other embeddings of the global batch.

    Args:
        z1, z2: (B, D) embeddings of this rank's two views, unnormalised; row i of both is sample i.
    """
    n = z1.shape[0]
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2B, D)
    everything = distributed.all_gather_grad(z)  # (W*2B, D): each rank's two views, in rank order
    logits = z @ everything.T / temperature  # (2B, W*2B)
    first = 2 * n * distributed.rank()
    own = torch.arange(2 * n, device=z.device)
    logits[own, own + first] = float("-inf")
    return F.cross_entropy(logits, (own + n) % (2 * n) + first)
