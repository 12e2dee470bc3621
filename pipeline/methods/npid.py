"""NPID, instance discrimination against a memory bank (Wu et al. 2018, arXiv:1805.01978).

As its release has it (github.com/zhirongw/lemniscate.pytorch): a linear head of 128, temperature 0.07, 4,096 noise
samples, slots that move by half towards the new embedding, and the normaliser Z estimated from the first batch and
kept. The paper adds a proximal term that holds an embedding near its slot (equation 10); the release has none, so it is
off unless ``proximal_weight`` is set.

Deviations: one draw of noise serves the whole global batch instead of one per query, which reads 2 MiB of the bank in
a step of 256 instead of 512; a query's own slot is never its noise; the learning rate falls with a cosine, not in two
steps. With several views each is compared with the slot, which moves towards their mean; the paper has one view. With
``hard_negatives`` the slots most similar to a query are told from its own too, an option the paper does not have.
"""

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline import distributed
from pipeline.data.views import RECIPES, View
from pipeline.losses.nce import chance, log_normalizer, nce
from pipeline.losses.precision import full_precision
from pipeline.methods.base import Method, MethodConfig
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.base import Slots

normalize = full_precision(F.normalize)


class NPIDConfig(MethodConfig):
    """The paper's values for ImageNet."""

    name: Literal["npid"] = "npid"
    views: tuple[View, ...] = RECIPES["npid"]
    num_samples: int = Field(ge=2)  # slots: the manifest's samples, as ids count over all its splits
    temperature: float = Field(default=0.07, gt=0)
    projection_dim: int = Field(default=128, ge=1)
    num_negatives: int = Field(default=4096, ge=1)
    hard_negatives: int = Field(default=0, ge=0)  # the slots most similar to each query, as noise besides the drawn
    proximal_weight: float = Field(default=0.0, ge=0)  # lambda of equation 10
    bank_momentum: float = Field(default=0.5, ge=0, lt=1)
    bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _hard_ones_are_of_others(self) -> Self:
        if self.hard_negatives >= self.num_samples:
            raise ValueError(
                f"method.hard_negatives={self.hard_negatives} slots of other samples are more than there are; use at "
                f"most method.num_samples - 1 = {self.num_samples - 1}"
            )
        return self

    def check(self, model: BackboneConfig) -> None:
        """Any number of views will do, and any model."""


class NPID(Method):
    """backbone -> linear head -> NCE against the slots of the bank."""

    Config: ClassVar[type[MethodConfig]] = NPIDConfig
    log_z: Tensor

    def __init__(self, backbone: Backbone, config: NPIDConfig) -> None:
        super().__init__(backbone, config)
        self.temperature = config.temperature
        self.num_negatives, self.hard_negatives = config.num_negatives, config.hard_negatives
        self.proximal_weight, self.bank_momentum = config.proximal_weight, config.bank_momentum
        self.projection_head = nn.Linear(backbone.feature_dim, config.projection_dim)
        self.bank: Slots = MemoryBank(config.num_samples, config.projection_dim, getattr(torch, config.bank_dtype))
        self.register_buffer("log_z", torch.zeros(()))  # set at the first step

    def begin(self, sample_ids: Tensor) -> None:
        """Ask for the slots: a served bank fetches them while the views are embedded."""
        super().begin(sample_ids)
        self.bank.expect(sample_ids, self.num_negatives)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """One embedding per view, of length 1."""
        return tuple(normalize(self.projection_head(self.backbone(view))) for view in views)

    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """NCE of each view against the old slots, and its distance from its own; the slots of the batch then move."""
        slots, noise_ids, noise_slots = self.bank.read()
        is_own = self.sample_ids[:, None] == noise_ids[None]
        target = self.slot_target(embeddings).detach()
        with torch.autocast(embeddings[0].device.type, enabled=False):
            logits = [((f * slots).sum(1) / self.temperature, f @ noise_slots.T / self.temperature) for f in embeddings]
            hard_logits = self._hard_logits(embeddings, target)
        num_samples = self.bank.num_samples
        if self.bank.steps == 0:
            total, count = distributed.all_reduce_sum(
                torch.stack([torch.stack(log_normalizer(own, noise, is_own)) for own, noise in logits]).sum(0)
            )
            self.log_z.copy_((total / count).log() + math.log(num_samples))
        losses = [
            nce(own, noise, is_own, self.log_z, num_samples, hard=hard)
            for (own, noise), hard in zip(logits, hard_logits, strict=True)
        ]
        loss = self.combine(torch.stack(losses))
        metrics = {"loss_vs_chance": loss.detach() / chance(self.num_negatives)}
        if self.proximal_weight:
            distances = torch.stack([(f - slots).square().sum(1).mean() for f in embeddings])
            loss = loss + self.proximal_weight * self.combine(distances)
        self.bank.update(target, self.bank_momentum)
        return loss, metrics

    def _hard_logits(self, embeddings: tuple[Tensor, ...], target: Tensor) -> list[Tensor | None]:
        """(B, hard_negatives) of each view, against the slots most similar to where the sample's own one moves."""
        if not self.hard_negatives:
            return [None for _ in embeddings]
        slots = self.bank.hardest(target, self.hard_negatives)
        return [torch.einsum("bd,bkd->bk", f, slots) / self.temperature for f in embeddings]

    def gauges(self) -> dict[str, float]:
        """The bank's."""
        return self.bank.gauges()

    def combine(self, losses: Tensor) -> Tensor:
        """(views,) -> scalar."""
        return losses.mean()

    def slot_target(self, embeddings: tuple[Tensor, ...]) -> Tensor:
        """(B, D), of length 1: where the slots of the batch move."""
        mean: Tensor = normalize(torch.stack(embeddings).mean(0))
        return mean


METHOD = NPID
