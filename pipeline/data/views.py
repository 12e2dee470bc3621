"""Augmented views of an image, uint8 in and out, by config. (stub of the config; implementation follows)"""

from pydantic import BaseModel, ConfigDict, Field


class View(BaseModel):
    """One kind of augmented view; ``count`` copies of it are drawn from each image, independently.

    Defaults are SimCLR's for ImageNet (Chen et al. 2020, arXiv:2002.05709, appendix A).
    Multi-crop is two entries: ``[{count: 2}, {count: 6, size: 96, crop_scale: [0.05, 0.14]}]``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(default=1, ge=1)
    size: int | None = Field(default=None, ge=8)  # pixels; None = model.image_size
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)  # probability of a horizontal flip
    jitter: float = Field(default=0.8, ge=0, le=1)  # probability of colour jitter
    brightness: float = Field(default=0.8, ge=0)
    contrast: float = Field(default=0.8, ge=0)
    saturation: float = Field(default=0.8, ge=0)
    hue: float = Field(default=0.2, ge=0, le=0.5)
    grayscale: float = Field(default=0.2, ge=0, le=1)
    blur: float = Field(default=0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = Field(default=0.0, ge=0, le=1)
