"""What the loader hands to a method: the views of one rank's slice of a global batch."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One rank's slice of a global batch.

    The loader yields uint8 views on the CPU; ``train.py`` normalises them on the device, and colours them there if
    they come with draws, so a method always sees floats. B = samples on this rank; all views of a sample share its row.
    """

    views: list[Tensor]  # one (B, 3, H, W) per view; sizes may differ between views (multi-crop)
    sample_ids: Tensor  # (B,) int64, the manifest's dense ids
    draws: Tensor | None = None  # (B, views, UNIFORMS_PER_VIEW) on the CPU, where colour is left to the device
