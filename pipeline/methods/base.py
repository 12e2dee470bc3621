"""The contract between a self-supervised method and the rest of Parallax: views in, loss out.

A method is one file in this folder that ends in ``METHOD = TheClass``; ``method_class("simclr")`` finds it
by name. It knows nothing of Ray, files, optimizers or schedules.
"""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from pydantic import field_validator, model_validator
from torch import Tensor, nn

from pipeline.data.batch import Batch
from pipeline.data.views import RECIPES, View, named_views
from pipeline.losses.precision import SMALLEST_TEMPERATURE
from pipeline.models.backbone import Backbone, BackboneConfig
from pipeline.section import Section


class MethodConfig(Section):
    """What every method is configured by. A method subclasses it and adds its own hyper-parameters."""

    name: str
    views: tuple[View, ...]  # a list of views, or the name of a recipe in pipeline/data/views.py

    _named_views = field_validator("views", mode="before")(named_views)

    @model_validator(mode="after")
    def _exponentials_fit(self) -> Self:
        temperature, hardness = getattr(self, "temperature", 1.0), getattr(self, "hardness", 0.0)
        if temperature / (1 + hardness) < SMALLEST_TEMPERATURE:
            hard = f" / (1 + method.hardness={hardness:g})" if hardness else ""
            smallest = math.ceil(1e4 * SMALLEST_TEMPERATURE * (1 + hardness)) / 1e4
            raise ValueError(
                f"method.temperature={temperature:g}{hard} is below {SMALLEST_TEMPERATURE}, where exponentials of "
                f"similarities leave float64; use method.temperature >= {smallest:g}, e.g. {max(0.1, smallest):g}"
            )
        return self

    def check(self, model: BackboneConfig) -> None:
        """ValueError, when a config is read, if the method cannot be built around ``model`` or take these views."""
        if (count := sum(view.count for view in self.views)) != 2:
            pairs = [name for name, views in RECIPES.items() if sum(view.count for view in views) == 2]
            raise ValueError(
                f"method.views draws {count} views of an image, and {self.name} compares 2; recipes that work: "
                f"{', '.join(pairs)}, or method.views=[{{count: 2}}]"
            )


class Method(nn.Module, ABC):
    """A joint-embedding method around one backbone, in two parts: embed each sample, compare the embeddings.

    ``forward`` is called through DistributedDataParallel. The loss that a rank returns must make DDP's
    mean over ranks equal the single-process gradient on the global batch. ``metrics`` are detached scalars
    that stay on the device; ``train.py`` logs their mean over ranks.
    """

    Config: ClassVar[type[MethodConfig]]
    observed: tuple[Tensor, Tensor]  # the last step's embeddings of two views (B, D), for the collapse guard
    sample_ids: Tensor  # (B,) of the batch whose embeddings ``loss`` gets

    def __init__(self, backbone: Backbone, config: MethodConfig) -> None:
        super().__init__()
        self.backbone = backbone  # the encoder that is evaluated and exported
        self.views = config.views  # what the loader makes of each image

    @abstractmethod
    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        """What ``loss`` compares, (B, D) each, sample by sample, from float views (B, 3, H, W), normalised.

        The first two, if there are two, are embeddings of two views of the same samples.
        """

    @abstractmethod
    def loss(self, *embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, metrics) from what ``embed`` returns for this rank's whole batch."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, metrics) of this rank's batch."""
        self.begin(batch.sample_ids)
        embeddings = self.embed(batch.views)
        self.observe(*embeddings)
        return self.loss(*embeddings)

    def begin(self, sample_ids: Tensor) -> None:
        """Note which samples (B,) a step is about, before they are embedded."""
        self.sample_ids = sample_ids

    def observe(self, first: Tensor, second: Tensor | None = None, *_: Tensor) -> None:
        """Note the embeddings of a step, before its loss. A method of one view is compared with itself."""
        self.observed = first.detach(), (first if second is None else second).detach()

    def gauges(self) -> dict[str, float]:
        """What the method tells of its state when a step is logged: name -> this rank's value."""
        return {}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) module pairs; ``train.py`` moves each momentum module by the scheduled decay."""
        return []


def method_names() -> list[str]:
    """The methods that exist: the files of this folder."""
    package = importlib.import_module("pipeline.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")


def method_class(name: str) -> type[Method]:
    """``pipeline.methods.<name>.METHOD``; ValueError names the methods that exist."""
    if name not in method_names():
        raise ValueError(f"no method {name!r}; methods are {', '.join(method_names())}")
    method: type[Method] = importlib.import_module(f"pipeline.methods.{name}").METHOD
    return method
