"""The random directions that the slots of a memory bank start from: a pure function of the bank's seed and the sample.

So nobody has to send them: a shard makes its own, the local backend all of them, and both hold the same numbers.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def directions(seed: int, sample_ids: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
    """(n,) -> (n, ``dim``) of length 1: points uniform in a cube, as in the paper's release, made so.

    SplitMix64 (Steele et al. 2014) of a counter, two components from each of its numbers: 1 s for 1.28 million x 128.
    """
    pairs = (dim + 1) // 2
    columns = np.arange(1, pairs + 1, dtype=np.uint64)
    numbers: NDArray[np.uint64] = sample_ids.astype(np.uint64)[:, None] * np.uint64(pairs) + columns
    numbers *= _GOLDEN
    numbers += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    # the upper 24 of 32 bits: what float32 holds exactly
    cube = (numbers.view(np.uint32)[:, :dim] >> np.uint32(8)).astype(np.float32)
    cube -= np.float32(2**23 - 0.5)
    cube /= np.sqrt(np.square(cube).sum(1, keepdims=True))
    return cube
