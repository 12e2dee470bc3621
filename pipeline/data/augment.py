"""Draws augmented views of an image, uint8 in and out.

The operations, their order and their parameters are torchvision's (the tests hold them to it): with the decoding
13x (EPYC) to 35x (Xeon) its speed. Every random number comes from one row of uniforms per image, so the row's key,
(seed, epoch, position), decides every pixel, whoever computes it.
"""

import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.colour import (
    Planes,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    solarize,
    to_gray,
)
from pipeline.data.randaugment import rand_augment
from pipeline.data.resize import Pixels, resized_crop
from pipeline.data.views import View

UNIFORMS_PER_VIEW = 44  # a multiple of 4: Philox makes four 64-bit words at a time

# What each uniform of a view decides. Ten tries at a crop, two uniforms each, come first.
_CROP_TRIES = 10
_TOP, _LEFT, _FLIP = 20, 21, 22
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER = 23, 24, 25, 26, 27, 28
GRAYSCALE, BLUR, SIGMA, SOLARIZE = 29, 30, 31, 32
_RANDAUGMENT = 33  # up to three operations, two uniforms each
_AFFINE, _ROTATE, _SHEAR = 39, 40, 41

ORDERS = tuple(itertools.permutations(range(4)))  # of brightness, contrast, saturation and hue
_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation)
_HUE_TURN = 3


class Augmenter:
    """Draws all views of an image from one row of uniforms."""

    def __init__(self, views: Sequence[View], image_size: int, colour: bool = True) -> None:
        """``colour=False`` leaves jitter, gray, blur and solarisation to pipeline/data/device_views.py."""
        self._colour = colour
        self.views = [view for view in views for _ in range(view.count)]
        self.sizes = [view.size or image_size for view in self.views]
        self.num_uniforms = UNIFORMS_PER_VIEW * len(self.views)
        # What a decoder may reduce by: the smallest crop, at its narrowest, still has the largest size.
        self.decode_size = max(self.sizes)
        self.min_crop_area = min(v.crop_scale[0] * min(v.crop_ratio[0], 1 / v.crop_ratio[1]) for v in self.views)

    def __call__(self, image: Pixels, uniforms: NDArray[np.float64], into: Sequence[Planes]) -> None:
        """Fill ``into``, a (3, S, S) for each view, from ``image`` (H, W, 3) and ``uniforms`` (num_uniforms,)."""
        draws = uniforms.reshape(len(self.views), UNIFORMS_PER_VIEW).tolist()  # floats: numpy scalars cost 5x
        for view, planes, u in zip(self.views, into, draws, strict=True):
            write_planes(crop(image, view, planes.shape[1], u), planes)
            if self._colour:
                colour(planes, view, u)


def write_planes(image: Pixels, planes: Planes) -> None:
    """(S, S, 3) -> (3, S, S), by OpenCV: 3x numpy's speed."""
    cv2.split(image, list(planes))


def crop(image: Pixels, view: View, size: int, u: Sequence[float]) -> Pixels:
    """Crop, resize, flip and RandAugment: (H, W, 3) -> (size, size, 3); ``u``: UNIFORMS_PER_VIEW in [0, 1)."""
    top, left, height, width = crop_box(view, image.shape[0], image.shape[1], u)
    x = resized_crop(image, top, left, height, width, (size, size))
    if u[_FLIP] < view.flip:
        x = cv2.flip(x, 1)
    if u[_AFFINE] < view.affine:
        x = affine(x, view.rotate * (2 * u[_ROTATE] - 1), view.shear * (2 * u[_SHEAR] - 1))
    for operation in range(view.randaugment):
        at = _RANDAUGMENT + 2 * operation
        x = rand_augment(x, view.randaugment_magnitude, u[at], u[at + 1])
    return x


def colour(planes: Planes, view: View, u: Sequence[float]) -> None:
    """Jitter, gray, blur, solarisation of a view (3, S, S), in place."""
    if u[JITTER] < view.jitter:
        _jitter(planes, view, u)
    if u[GRAYSCALE] < view.grayscale:
        to_gray(planes)
    if u[BLUR] < view.blur:
        low, high = view.blur_sigma
        blur(planes, low + (high - low) * u[SIGMA])
    if u[SOLARIZE] < view.solarize:
        solarize(planes)


def _jitter(planes: Planes, view: View, u: Sequence[float]) -> None:
    strengths = (view.brightness, view.contrast, view.saturation)
    for operation in ORDERS[int(u[ORDER] * len(ORDERS))]:
        if operation == _HUE_TURN:
            if view.hue:
                adjust_hue(planes, view.hue * (2 * u[HUE] - 1))
        elif strengths[operation]:
            _ADJUST[operation](planes, _factor(strengths[operation], u[BRIGHTNESS + operation]))


def _factor(strength: float, u: float) -> float:
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


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


def affine(image: Pixels, rotate: float, shear: float) -> Pixels:
    """Bilinear rotation and horizontal shear, in degrees, around the centre of (H, W, 3); filled with black."""
    rotation, tan = math.radians(rotate), math.tan(math.radians(shear))
    cos, sin = math.cos(rotation), math.sin(rotation)
    matrix = np.array([[cos, -cos * tan - sin], [sin, cos - sin * tan]])
    centre = np.array([image.shape[1] - 1, image.shape[0] - 1]) / 2
    forward = np.column_stack([matrix, centre - matrix @ centre])
    return cv2.warpAffine(image, forward, image.shape[1::-1], flags=cv2.INTER_LINEAR)
