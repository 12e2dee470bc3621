"""PIRL: an image and its rotation agree with one slot of a memory bank (Misra, van der Maaten 2020, arXiv:1912.01991).

Equation 5: NCE of the slot with the rotated view, through a head of its own, and with the plain view, half each; the
slot moves towards the plain view alone. The bank and its NCE are NPID's, deviations included: as in the authors'
release (github.com/facebookresearch/vissl, nce_loss.py), a similarity is divided by one constant Z. The paper's
equation 3 divides it by the sum over its own noise instead.

Deviations: the rotation is the pretext task (the paper's second; the release has only its first, jigsaw), and a step
turns all its images by the same angle, 90, 180 and 270 degrees in turn: a function of the step, so the same for any
number of ranks and micro-batches. Plain and rotated view are crops of their own; the release cuts its patches and its
image from one file independently, too.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.data.views import RECIPES, View
from pipeline.methods.base import MethodConfig
from pipeline.methods.npid import NPID, NPIDConfig, normalize
from pipeline.models.backbone import Backbone, BackboneConfig


class PIRLConfig(NPIDConfig):
    """The release's values for ImageNet (pirl_jigsaw_4node_resnet50.yaml)."""

    name: Literal["pirl"] = "pirl"  # type: ignore[assignment]
    views: tuple[View, ...] = RECIPES["pirl"]
    num_negatives: int = Field(default=32000, ge=1)
    rotated_weight: float = Field(default=0.5, ge=0, le=1)  # lambda: of the rotated view's loss

    def check(self, model: BackboneConfig) -> None:
        """Two views: a plain one, and one to rotate."""
        MethodConfig.check(self, model)


class PIRL(NPID):
    """NPID with a second view, rotated, under a head of its own."""

    Config: ClassVar[type[MethodConfig]] = PIRLConfig

    def __init__(self, backbone: Backbone, config: PIRLConfig) -> None:
        super().__init__(backbone, config)
        self.rotated_head = nn.Linear(backbone.feature_dim, config.projection_dim)
        self.rotated_weight = config.rotated_weight

    def begin(self, sample_ids: Tensor) -> None:
        """Choose the step's rotation: micro-batches are embedded once more after the bank has moved on."""
        super().begin(sample_ids)
        self._quarter_turns = 1 + self.bank.steps % 3

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """(f, g), of length 1: of the plain view and of the rotated one."""
        plain, other = views
        rotated = torch.rot90(other, self._quarter_turns, dims=(2, 3))
        f, g = self.projection_head(self.backbone(plain)), self.rotated_head(self.backbone(rotated))
        return normalize(f), normalize(g)

    def combine(self, losses: Tensor) -> Tensor:
        """lambda x the rotated view's and 1 - lambda x the plain view's."""
        return torch.lerp(losses[0], losses[1], self.rotated_weight)

    def slot_target(self, embeddings: tuple[Tensor, ...]) -> Tensor:
        """The plain view's."""
        return embeddings[0]


METHOD = PIRL
