"""MoCHi: synthetic negatives, mixed from a query's hardest ones (Kalantidis et al. 2020, arXiv:2010.01028).

The hardest negatives of a query are few among 65,536; mixing pairs of them, and them with the query itself, gives it
more at the price of a dot product each. All are constants: the gradient reaches the query through its logits alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.section import Section


class MochiConfig(Section):
    """The paper's (1024, 1024, 128) for ImageNet, from some steps on: early queries know no hard negatives."""

    hardest: int = Field(default=1024, ge=1)  # N: the most similar negatives, from which all are mixed
    mixed: int = Field(default=1024, ge=0)  # s: of two of them
    with_query: int = Field(default=128, ge=0)  # s': of one of them and at most half the query
    start_step: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Draws:
    """What is random in the mixtures of some queries."""

    pairs: Tensor  # (B, s, 2) of the N hardest
    shares: Tensor  # (B, s), of the first of the pair; in [0, 1)
    singles: Tensor  # (B, s')
    query_shares: Tensor  # (B, s'), in [0, 0.5)

    @classmethod
    def of(cls, config: MochiConfig, queries: int, seed: int) -> "Draws":
        """For a global batch of queries, on the CPU: the same on every rank, which takes its own rows."""
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randint(config.hardest, (queries, config.mixed, 2), generator=generator),
            torch.rand(queries, config.mixed, generator=generator),
            torch.randint(config.hardest, (queries, config.with_query), generator=generator),
            torch.rand(queries, config.with_query, generator=generator) / 2,
        )

    def rows(self, rows: slice, device: torch.device) -> "Draws":
        """Those of some queries, on ``device``."""
        parts = (self.pairs, self.shares, self.singles, self.query_shares)
        return Draws(*(part[rows].to(device) for part in parts))


@torch.no_grad()
def mixtures(query: Tensor, negatives: Tensor, is_own: Tensor | None, hardest: int, draws: Draws) -> Tensor:
    """(B, s + s', D) synthetic negatives of length 1 for queries (B, D), from keys (K, D), K >= ``hardest``.

    ``is_own`` (B, K): keys of the query's own sample, which are never mixed; a query that meets fewer than ``hardest``
    others mixes those.
    """
    negatives = negatives.to(query.dtype)
    similarity = query @ negatives.T  # (B, K)
    others = similarity.new_full((len(query), 1), hardest, dtype=torch.int64)
    if is_own is not None:
        similarity.masked_fill_(is_own, -torch.inf)
        others = (~is_own).sum(1, keepdim=True).clamp(1, hardest)
    hard = similarity.topk(hardest, dim=1).indices  # (B, N), the hardest first

    def picked(places: Tensor) -> Tensor:
        return negatives[hard.gather(1, places % others)]

    share, query_share = (x.to(query.dtype)[..., None] for x in (draws.shares, draws.query_shares))
    of_pairs = share * picked(draws.pairs[..., 0]) + (1 - share) * picked(draws.pairs[..., 1])
    with_query = query_share * query[:, None] + (1 - query_share) * picked(draws.singles)
    return F.normalize(torch.cat([of_pairs, with_query], dim=1), dim=2)
