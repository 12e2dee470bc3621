"""Augmented views of an image, uint8 in and out, by config.

The operations, their order and their parameters are torchvision's (the tests hold them to it), computed with
OpenCV: with the decoding 29x torchvision's speed on a core, mostly by a separable blur. Every random number comes from
one row of uniforms per image, so the row's key, (seed, epoch, position), decides every pixel, whoever computes it.

Papers: SimCLR arXiv:2002.05709, BYOL arXiv:2006.07733 (appendix B), MoCo v2 arXiv:2003.04297, SwAV's multi-crop
arXiv:2006.09882.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.randaugment import BINS, LUMA, blend, gray, rand_augment, transform

Pixels = NDArray[Any]  # uint8 (H, W, 3) RGB; OpenCV's stubs promise any number

UNIFORMS_PER_VIEW = 44  # a multiple of 4: Philox makes four 64-bit words at a time

# What each uniform of a view decides. Ten tries at a crop, two uniforms each, come first.
_CROP_TRIES = 10
_TOP, _LEFT, _FLIP = 20, 21, 22
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER = 23, 24, 25, 26, 27, 28
GRAYSCALE, BLUR, SIGMA, SOLARIZE = 29, 30, 31, 32
_RANDAUGMENT = 33  # up to three operations, two uniforms each
_AFFINE, _ROTATE, _SHEAR = 39, 40, 41

ORDERS = tuple(itertools.permutations(range(4)))
HUE_SCALE = 255.999 / 255  # torchvision goes from [0, 1] back to uint8 so, truncating
_IDENTITY = np.eye(3, dtype=np.float32)


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
    randaugment_magnitude: int = Field(default=9, ge=0, lt=BINS)

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


class Augmenter:
    """Draws all views of an image from one row of uniforms."""

    def __init__(self, views: Sequence[View], image_size: int, colour: bool = True) -> None:
        """``colour=False`` leaves jitter, gray, blur and solarisation to pipeline/data/device_views.py."""
        self._augment = augment if colour else augment_geometry
        self.views = [view for view in views for _ in range(view.count)]
        self.sizes = [view.size or image_size for view in self.views]
        self.num_uniforms = UNIFORMS_PER_VIEW * len(self.views)
        # What a decoder may reduce by: the smallest crop, at its narrowest, still has the largest size.
        self.decode_size = max(self.sizes)
        self.min_crop_area = min(v.crop_scale[0] * min(v.crop_ratio[0], 1 / v.crop_ratio[1]) for v in self.views)

    def __call__(self, image: Pixels, uniforms: NDArray[np.float64]) -> list[Pixels]:
        """``image`` (H, W, 3), ``uniforms`` (num_uniforms,) -> one (S, S, 3) per view; ``image`` stays as it is."""
        draws = uniforms.reshape(len(self.views), UNIFORMS_PER_VIEW).tolist()  # floats: numpy scalars cost 5x
        return [self._augment(image, *each) for each in zip(self.views, self.sizes, draws, strict=True)]


def augment(image: Pixels, view: View, size: int, u: Sequence[float]) -> Pixels:
    """One view (size, size, 3) of ``image`` (H, W, 3); ``u``: UNIFORMS_PER_VIEW uniforms in [0, 1)."""
    return augment_colour(augment_geometry(image, view, size, u), view, u)


def augment_geometry(image: Pixels, view: View, size: int, u: Sequence[float]) -> Pixels:
    """Crop, flip and RandAugment."""
    top, left, height, width = crop_box(view, image.shape[0], image.shape[1], u)
    x = resize(image[top : top + height, left : left + width], size)
    if u[_FLIP] < view.flip:
        x = cv2.flip(x, 1)
    if u[_AFFINE] < view.affine:
        x = affine(x, view.rotate * (2 * u[_ROTATE] - 1), view.shear * (2 * u[_SHEAR] - 1))
    for operation in range(view.randaugment):
        at = _RANDAUGMENT + 2 * operation
        x = rand_augment(x, view.randaugment_magnitude, u[at], u[at + 1])
    return x


def augment_colour(x: Pixels, view: View, u: Sequence[float]) -> Pixels:
    """Jitter, gray, blur, solarisation of a view (S, S, 3)."""
    if u[JITTER] < view.jitter:
        for operation in ORDERS[int(u[ORDER] * len(ORDERS))]:
            x = _JITTERS[operation](x, view, u)
    if u[GRAYSCALE] < view.grayscale:
        x = gray(x)
    if u[BLUR] < view.blur:
        low, high = view.blur_sigma
        x = blur(x, low + (high - low) * u[SIGMA])
    if u[SOLARIZE] < view.solarize:
        x = cv2.min(x, 255 - x)  # inverted from 128 on
    return x


def crop_box(view: View, height: int, width: int, u: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) by the rule of torchvision's RandomResizedCrop."""
    low, high = view.crop_scale
    log_low, log_high = math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])
    area = height * width
    for attempt in range(_CROP_TRIES):
        target = area * (low + (high - low) * u[2 * attempt])
        ratio = math.exp(log_low + (log_high - log_low) * u[2 * attempt + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[_TOP] * (height - h + 1)), int(u[_LEFT] * (width - w + 1)), h, w
    ratio = min(max(width / height, view.crop_ratio[0]), view.crop_ratio[1])  # as much of the centre as fits
    w, h = min(width, max(round(height * ratio), 1)), min(height, max(round(width / ratio), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Pixels, height: int, width: int | None = None) -> Pixels:
    """Antialiased bilinear to (height, width, 3); square unless ``width`` is given.

    torchvision convolves with a triangle that widens with the reduction s. Here a 3-tap filter supplies the
    variance, (s^2 - 1) / 6, that plain bilinear interpolation lacks: mean |difference| 0.3 of 255, 2.7x faster than
    an exact one (300 against 800 us from 480 x 370 to 224).
    """
    width = height if width is None else width
    while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:  # averages of 2 x 2 are quick
        half = (image.shape[1] // 2, image.shape[0] // 2)
        image = cv2.resize(image, half, interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (height, width):
        return image
    taps = [
        max((source / target) ** 2 - 1, 0) / 12 for source, target in zip(image.shape[:2], (height, width), strict=True)
    ]
    if max(taps) > 0.03:  # reductions by less than 1.17 need none
        rows, columns = (np.array([min(a, 0.33), 1 - 2 * min(a, 0.33), min(a, 0.33)], np.float32) for a in taps)
        image = cv2.sepFilter2D(image, -1, columns, rows, borderType=cv2.BORDER_REPLICATE)
    cv2.ipp.setUseIPP_NotExact(True)  # in float: twice as quick, and nearer to torchvision
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.ipp.setUseIPP_NotExact(False)  # of this thread, where it would change what comes before the next time
    return resized


def affine(image: Pixels, rotate: float, shear: float) -> Pixels:
    """Bilinear rotation and horizontal shear, in degrees, around the centre of (H, W, 3); filled with black."""
    rotation, tan = math.radians(rotate), math.tan(math.radians(shear))
    cos, sin = math.cos(rotation), math.sin(rotation)
    matrix = np.array([[cos, -cos * tan - sin], [sin, cos - sin * tan]])
    centre = np.array([image.shape[1] - 1, image.shape[0] - 1]) / 2
    forward = np.column_stack([matrix, centre - matrix @ centre])
    return cv2.warpAffine(image, forward, image.shape[1::-1], flags=cv2.INTER_LINEAR)


def blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur with SimCLR's kernel, a tenth of the image's side, cut at 3 sigma (what is beyond is < 0.3 %)."""
    side = max(image.shape[0] // 10 | 1, 3)
    kernel = gaussian_kernel(min(side, 2 * math.ceil(3 * sigma) + 1), sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel)  # border: reflect-101, as torchvision


def gaussian_kernel(taps: int, sigma: float) -> NDArray[np.float32]:
    """(taps,) float32, sums to 1."""
    return np.asarray(cv2.getGaussianKernel(taps, sigma, cv2.CV_32F), np.float32)


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """``factor`` x, clipped."""
    return transform(image, factor * _IDENTITY, 0.0)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Away from (or towards) the mean of the gray image, whose truncation takes half a level off."""
    mean = float(LUMA[0] @ cv2.mean(image)[:3]) - 0.5
    return transform(image, factor * _IDENTITY, (1 - factor) * mean)


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    """Away from (or towards) the gray image."""
    return blend(image, gray(image), factor)


def adjust_hue(image: Pixels, shift: float) -> Pixels:
    """Turn the hue by ``shift`` of a full circle, in uint8 throughout: 0.6 of the time of a float32 HSV, 0.04 off.

    Between the least (m) and the largest (m + C) of a pixel's channels each follows the hue on a trapezoid: up for one
    sextant, flat for two, down for one, flat for two. So a turn by a share f of a sextant makes of red

        m + clip(R - G + (C (1 - f) if G > B else C f), 0, C)

    and of green and blue the same with the channels' names moved on. A turn by a whole sextant moves them on by one and
    swaps the signs of all differences.
    """
    height = image.shape[0]
    planes = np.empty((5 * height, image.shape[1]), np.uint8)  # red, green, blue, red, green
    r, g, b = (planes[c * height : (c + 1) * height] for c in range(3))
    cv2.split(image, [r, g, b])
    planes[3 * height :] = planes[: 2 * height]
    # Of red, green and blue at once: the channel itself, the one after it, the one after that.
    x, y, z = (planes[c * height : (c + 3) * height] for c in range(3))
    low = cv2.min(cv2.min(r, g), b)
    chroma = cv2.subtract(cv2.max(cv2.max(r, g), b), low)

    sextants = int(shift % 1 * 6)
    share = shift % 1 * 6 - sextants
    # HUE_SCALE multiplies the result; what it adds is that of the middle of the pixel's range.
    excess = HUE_SCALE - 1
    up = cv2.addWeighted(chroma, share + excess / 2, low, excess, -0.499)
    down = cv2.addWeighted(chroma, 1 - share + excess / 2, low, excess, -0.499)
    larger, smaller = y, z
    if sextants % 2:
        x, y, larger, smaller = y, x, z, y
    if share > 0.5:  # the larger of the two parts is masked below
        up, down, larger, smaller = down, up, smaller, larger
    part = cv2.compare(larger, smaller, cv2.CMP_GT).reshape(3, *low.shape)  # 255 or 0
    np.minimum(part, down, out=part)
    np.maximum(part, up, out=part)

    # uint8 saturates at 0; at 255 only where the next line clips anyway.
    turned = cv2.add(cv2.subtract(x, y), part.reshape(x.shape))
    cv2.subtract(turned, cv2.subtract(y, x), dst=turned)
    channels = turned.reshape(part.shape)
    np.minimum(channels, chroma, out=channels)
    np.add(channels, low, out=channels)
    merged: Pixels = cv2.merge([channels[(c + sextants) % 3] for c in range(3)])
    return merged


def _factor(strength: float, u: float) -> float:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


_JITTERS: tuple[Any, ...] = (
    lambda x, view, u: adjust_brightness(x, _factor(view.brightness, u[BRIGHTNESS])) if view.brightness else x,
    lambda x, view, u: adjust_contrast(x, _factor(view.contrast, u[CONTRAST])) if view.contrast else x,
    lambda x, view, u: adjust_saturation(x, _factor(view.saturation, u[SATURATION])) if view.saturation else x,
    lambda x, view, u: adjust_hue(x, view.hue * (2 * u[HUE] - 1)) if view.hue else x,
)
