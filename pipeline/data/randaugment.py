"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): torchvision's operations and strengths, by OpenCV on uint8.

Geometric operations take the nearest pixel and fill with black, as torchvision's defaults do.
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.data.colour import LUMA
from pipeline.data.resize import Pixels
from pipeline.data.views import MAGNITUDES

_LUMA = np.tile(np.array(LUMA, np.float32), (3, 1))
_LEVELS = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


def rand_augment(image: Pixels, magnitude: int, u_operation: float, u_sign: float) -> Pixels:
    """One random operation of ``OPERATIONS`` on (H, W, 3); ``magnitude`` in [0, 30], uniforms in [0, 1)."""
    operation = list(OPERATIONS.values())[int(u_operation * len(OPERATIONS))]
    return operation(image, magnitude / (MAGNITUDES - 1), -1.0 if u_sign < 0.5 else 1.0)


def _transform(image: Pixels, matrix: NDArray[np.float32], offset: float) -> Pixels:
    """``matrix`` (3, 3) @ each pixel of (H, W, 3) + ``offset``, clipped and truncated."""
    full = np.empty((3, 4), np.float32)
    full[:, :3] = matrix
    full[:, 3] = offset - 0.499  # torchvision truncates, OpenCV rounds; whole numbers stay
    return cv2.transform(image, full)


def _gray(image: Pixels) -> Pixels:
    """(H, W, 3) of equal channels."""
    return _transform(image, _LUMA, 0.0)


def _blend(image: Pixels, other: Pixels, factor: float) -> Pixels:
    """``factor`` x image + (1 - factor) x other, clipped; both (H, W, 3)."""
    return cv2.addWeighted(image, factor, other, 1 - factor, -0.499)  # truncated, as in _transform


def _warp(image: Pixels, matrix: list[list[float]]) -> Pixels:
    """``matrix`` (2, 3) takes an output's pixel centre to an input's, in units of pixels from the corner."""
    (a, b, c), (d, e, f) = matrix
    at_indices = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, at_indices, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)


def _shear_x(image: Pixels, strength: float, sign: float) -> Pixels:
    return _warp(image, [[1, sign * 0.3 * strength, 0], [0, 1, 0]])


def _shear_y(image: Pixels, strength: float, sign: float) -> Pixels:
    return _warp(image, [[1, 0, 0], [sign * 0.3 * strength, 1, 0]])


def _translate_x(image: Pixels, strength: float, sign: float) -> Pixels:
    return _warp(image, [[1, 0, -int(sign * 150 / 331 * image.shape[1] * strength)], [0, 1, 0]])


def _translate_y(image: Pixels, strength: float, sign: float) -> Pixels:
    return _warp(image, [[1, 0, 0], [0, 1, -int(sign * 150 / 331 * image.shape[0] * strength)]])


def _rotate(image: Pixels, strength: float, sign: float) -> Pixels:
    angle = math.radians(sign * 30 * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return _warp(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _brightness(image: Pixels, strength: float, sign: float) -> Pixels:
    return _blend(image, np.zeros_like(image), 1 + sign * 0.9 * strength)


def _color(image: Pixels, strength: float, sign: float) -> Pixels:
    return _blend(image, _gray(image), 1 + sign * 0.9 * strength)


def _contrast(image: Pixels, strength: float, sign: float) -> Pixels:
    factor = 1 + sign * 0.9 * strength
    return _transform(image, factor * np.eye(3, dtype=np.float32), (1 - factor) * cv2.mean(_gray(image))[0])


def _sharpness(image: Pixels, strength: float, sign: float) -> Pixels:
    smooth = image.copy()
    if min(image.shape[:2]) > 2:  # the border stays
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(image, smooth, 1 + sign * 0.9 * strength)


def _posterize(image: Pixels, strength: float, sign: float) -> Pixels:
    bits = 8 - round(4 * strength)
    return cv2.LUT(image, (_LEVELS & 255 << (8 - bits)).astype(np.uint8))


def _solarize(image: Pixels, strength: float, sign: float) -> Pixels:
    threshold = 255 * (1 - strength)
    return cv2.LUT(image, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS).astype(np.uint8))


def _autocontrast(image: Pixels, strength: float, sign: float) -> Pixels:
    def table(channel: Pixels) -> NDArray[Any]:
        low, high = int(channel.min()), int(channel.max())
        return (_LEVELS - low) * (255 / (high - low)) if high > low else _LEVELS

    return _by_channel(image, table)


def _equalize(image: Pixels, strength: float, sign: float) -> Pixels:
    def table(channel: Pixels) -> NDArray[Any]:
        histogram = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - int(histogram[np.flatnonzero(histogram)[-1]])) // 255
        if step == 0:
            return _LEVELS
        return (np.cumsum(histogram) - histogram + step // 2) // step

    return _by_channel(image, table)


def _by_channel(image: Pixels, table: Callable[[Pixels], NDArray[Any]]) -> Pixels:
    tables = [table(image[..., channel]).clip(0, 255).astype(np.uint8) for channel in range(3)]
    return cv2.LUT(image, np.stack(tables, axis=-1)[None])


OPERATIONS: dict[str, Callable[[Pixels, float, float], Pixels]] = {
    "Identity": lambda image, strength, sign: image,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
