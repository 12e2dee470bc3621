"""Which views are drawn of an image, by config; pipeline/data/augment.py draws them.

Papers: SimCLR arXiv:2002.05709, BYOL arXiv:2006.07733 (appendix B), MoCo v2 arXiv:2003.04297, SwAV's multi-crop
arXiv:2006.09882.
"""

import math
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.section import Section

MAGNITUDES = 31  # RandAugment's go from 0 to 30


class View(Section):
    """One kind of augmented view; ``count`` copies of it are drawn from each image, independently.

    Defaults are SimCLR's for ImageNet (Chen et al. 2020, arXiv:2002.05709, appendix A).
    Multi-crop is two entries: ``[{count: 2}, {count: 6, size: 96, crop_scale: [0.05, 0.14]}]``.
    """

    count: int = Field(default=1, ge=1)
    size: int | None = Field(default=None, ge=8)  # pixels; None = model.image_size
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)  # probability of a horizontal flip
    affine: float = Field(default=0.0, ge=0, le=1)  # probability of a rotation and shear (digits, medical images)
    rotate: float = Field(default=20.0, ge=0, le=180)  # degrees, at most, either way
    shear: float = Field(default=20.0, ge=0, lt=90)  # degrees, at most, either way, horizontally
    jitter: float = Field(default=0.8, ge=0, le=1)  # probability of colour jitter
    brightness: float = Field(default=0.8, ge=0)
    contrast: float = Field(default=0.8, ge=0)
    saturation: float = Field(default=0.8, ge=0)
    hue: float = Field(default=0.2, ge=0, le=0.5)
    grayscale: float = Field(default=0.2, ge=0, le=1)
    blur: float = Field(default=0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = Field(default=0.0, ge=0, le=1)
    randaugment: int = Field(default=0, ge=0, le=3)  # operations, after crop and flip
    randaugment_magnitude: int = Field(default=9, ge=0, lt=MAGNITUDES)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        rules = {"crop_scale": (0.0, 1.0), "crop_ratio": (0.0, math.inf), "blur_sigma": (0.0, math.inf)}
        for name, (lowest, highest) in rules.items():
            low, high = getattr(self, name)
            if not lowest < low <= high <= highest:
                raise ValueError(
                    f"{name}=({low}, {high}) must be (low, high) with {lowest:g} < low <= high <= {highest:g}; "
                    f"the default is {View.model_fields[name].default}"
                )
        return self


RECIPES: dict[str, tuple[View, ...]] = {
    "simclr": (View(count=2),),
    # MoCo v1, arXiv:1911.05722, and v2; v1 turns gray before the jitter, which has the same distribution but for hue.
    "moco-v1": (
        View(count=2, crop_scale=(0.2, 1.0), jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, blur=0),
    ),
    "npid": (View(crop_scale=(0.2, 1.0), jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, blur=0),),
    # the release's for the whole image, but for its random photometric transform
    "pirl": (View(count=2, jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, blur=0),),
    "moco-v2": (View(count=2, crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),),
    # table 6 of the paper: the second view is rarely blurred and sometimes solarised
    "byol": (
        View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0),
        View(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarize=0.2),
    ),
    "moco-v3": (  # arXiv:2104.02057: BYOL's, with the release's --crop-min=.2 for ResNets; its ViTs have BYOL's 0.08
        View(crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0),
        View(crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarize=0.2),
    ),
    "swav": (View(count=2, crop_scale=(0.14, 1.0)), View(count=6, size=96, crop_scale=(0.05, 0.14))),
    "randaugment": (
        View(count=2, jitter=0, grayscale=0, blur=0, randaugment=2, randaugment_magnitude=9),
    ),  # its paper's N and M for ResNet-50
    # 28 to 32 px: SimCLR's appendix B.9 (half the colour strength, no blur).
    "simclr-small": (View(count=2, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0),),
}


def named_views(value: Any) -> Any:
    """The views of a recipe for its name; anything else as it is. ValueError lists the recipes."""
    if not isinstance(value, str):
        return value
    if value not in RECIPES:
        raise ValueError(f"no views {value!r}; recipes are {', '.join(RECIPES)}, or give a list of views")
    return RECIPES[value]
