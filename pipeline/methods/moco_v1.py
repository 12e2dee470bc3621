"""MoCo v1: a query against its key and a queue of keys from earlier batches (He et al. 2019, arXiv:1911.05722).

As published: SGD, temperature 0.07, a linear head, one direction (view 1 queries, view 2 is the key), the keys of a
batch enter the queue after its loss. Published order: EMA of the key encoder, then the keys; here the EMA follows the
optimizer's step before, which is the same, as both encoders start equal.

Deviations: statistics of BatchNorm over the global batch, in both encoders, take the place of shuffled BatchNorm
(shuffling breaks the link between a query's and its key's GPU, which global statistics don't have; MoCo v3 does the
same); the learning rate falls with a cosine, as in v2, not in steps.
"""

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.infonce import info_nce
from pipeline.losses.mochi import Draws, MochiConfig, mixtures
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone
from pipeline.models.momentum import momentum_copy
from pipeline.negatives.base import Negatives
from pipeline.negatives.queue import MomentumQueue

normalize = full_precision(F.normalize)


class MoCoV1Config(MethodConfig):
    """The paper's values for ImageNet; jitter with NPID's strengths, always."""

    name: Literal["moco_v1"] = "moco_v1"
    views: tuple[View, ...] = RECIPES["moco-v1"]
    temperature: float = Field(default=0.07, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    queue_size: int = Field(default=65536, ge=1)  # keys; at least the global batch
    queue_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    exclude_own_keys: bool = False  # a key of the query's own image, from an earlier epoch, is then no negative
    positive_prior: float = Field(default=0.0, ge=0, lt=1)  # tau+ of the debiased loss (Chuang et al. 2020)
    hardness: float = Field(default=0.0, ge=0)  # beta of hard negatives (Robinson et al. 2021), as a share of 1/T
    mochi: MochiConfig | None = None  # mixtures of hard negatives, e.g. {hardest: 1024, mixed: 1024, with_query: 128}
    ema_decay: float = Field(default=0.999, ge=0, le=1)

    @model_validator(mode="after")
    def _hardest_are_in_the_queue(self) -> Self:
        if self.mochi is not None and self.mochi.hardest > self.queue_size:
            raise ValueError(
                f"method.mochi.hardest={self.mochi.hardest} negatives are more than the queue has; use at most "
                f"method.queue_size={self.queue_size}"
            )
        return self


class MoCoV1(Method):
    """query encoder and its momentum copy -> InfoNCE against the queue."""

    Config: ClassVar[type[MethodConfig]] = MoCoV1Config

    def __init__(self, backbone: Backbone, config: MoCoV1Config) -> None:
        super().__init__(backbone, config)
        self.temperature = config.temperature
        self.exclude_own_keys = config.exclude_own_keys
        self.positive_prior, self.hardness = config.positive_prior, config.hardness
        self.mochi = config.mochi
        self.projection_head = self.build_head(backbone.feature_dim, config.projection_dim)
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_head = momentum_copy(self.projection_head)
        self.queue: Negatives = MomentumQueue(
            config.queue_size, config.projection_dim, getattr(torch, config.queue_dtype)
        )

    def build_head(self, feature_dim: int, projection_dim: int) -> nn.Module:
        """features (B, feature_dim) -> (B, projection_dim)."""
        return nn.Linear(feature_dim, projection_dim)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(q, k), of length 1: queries from the first view, keys from the second."""
        view_q, view_k = views
        q = normalize(self.projection_head(self.backbone(view_q)))  # (B, D)
        with torch.no_grad():
            k = normalize(self.momentum_head(self.momentum_backbone(view_k)))  # (B, D)
        return q, k

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE against the old queue, which then takes the keys of all ranks."""
        q, k = embeddings
        negatives = self.queue.negatives()
        loss = info_nce(
            q,
            k,
            negatives,
            self.temperature,
            sample_ids=(self.sample_ids, self.queue.sample_ids) if self.exclude_own_keys else None,
            positive_prior=self.positive_prior,
            hardness=self.hardness,
            synthetic=None if self.mochi is None else self._mixtures(q.detach(), negatives, self.mochi),
        )
        self.queue.enqueue(k, self.sample_ids)
        return loss, {"loss_vs_chance": loss.detach() / math.log(len(negatives) + 1)}

    def _mixtures(self, q: Tensor, negatives: Tensor, config: MochiConfig) -> Tensor | None:
        rank, count = distributed.rank(), len(q)
        batch = count * distributed.world_size()
        step = self.queue.enqueued() // batch
        if step < config.start_step:
            return None
        draws = Draws.of(config, batch, seed=step)
        is_own = self.sample_ids[:, None] == self.queue.sample_ids[None] if self.exclude_own_keys else None
        own_draws = draws.rows(slice(rank * count, (rank + 1) * count), q.device)
        return mixtures(q, negatives, is_own, config.hardest, own_draws)

    def gauges(self) -> dict[str, float]:
        """The queue's."""
        return self.queue.gauges()

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum)."""
        return [(self.backbone, self.momentum_backbone), (self.projection_head, self.momentum_head)]


METHOD = MoCoV1
