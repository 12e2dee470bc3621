"""95 % intervals of accuracies on a finite validation split: what another draw of as many images could have given."""

import math

from torch import Tensor

Interval = tuple[float, float]  # (low, high), as shares

_Z = 1.959964  # of the normal distribution, two-sided 95 %


def accuracy_interval(hits: Tensor) -> Interval:
    """Of the share that holds in the (N,) mask: Wilson's (1927), which stays inside [0, 1] and is right near 1."""
    n, share = len(hits), float(hits.double().mean())
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def difference_interval(hits: Tensor, others: Tensor) -> Interval:
    """Of the accuracy in ``hits`` less that in ``others``, both (N,) masks over the same images.

    Agresti & Min 2005 (doi:10.1002/sim.1781): half an image more in each cell of the table of pairs. Only images on
    which the two differ count, so it is narrower than what two separate intervals tell.
    """
    won, lost = (int(x.sum()) + 0.5 for x in (hits & ~others, others & ~hits))
    n = len(hits) + 2
    half = _Z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return (won - lost) / n - half, (won - lost) / n + half
