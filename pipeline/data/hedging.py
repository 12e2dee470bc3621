"""When a request is so slow that a second one is sent (Dean & Barroso, The Tail at Scale, 2013).

A multiple of what other requests of the process take, not a fixed time: what is slow on a link of 10 Gbit/s is quick on
one of 10 Mbit/s. Where the store slows down as a whole, the median follows within 16 requests.
"""

import statistics
import time
from collections import deque

from pipeline.data import patience
from pipeline.data.patience import Patience
from pipeline.data.ranged_get import RangedGet

MULTIPLE = 8  # of the median time, twice that for the next and so on
LEAST_S = 2.0  # no second request before
ENOUGH = 8  # requests that make a median
_LATELY = 32
_LONG_BYTES = 2**20  # shorter bodies say nothing of the rate
_FIRST_BYTES = 2**16  # of which the rate is no question yet


class Usual:
    """How long the process's requests took lately: until the answer, and for each byte of a long body."""

    def __init__(self) -> None:
        self._answers: deque[float] = deque(maxlen=_LATELY)
        self._per_byte: deque[float] = deque(maxlen=_LATELY)

    def note(self, get: RangedGet) -> None:
        """``get`` is finished."""
        self._answers.append(get.answered_after_s)
        if get.received >= _LONG_BYTES:
            self._per_byte.append((time.monotonic() - get.began - get.answered_after_s) / get.received)

    def seconds(self, get: RangedGet) -> float:
        """What it takes others to come as far as ``get``; infinite where too few are known."""
        if len(self._answers) < ENOUGH or (get.answered and len(self._per_byte) < ENOUGH):
            return float("inf")
        seconds = statistics.median(tuple(self._answers))
        if get.answered:
            seconds += max(get.received, _FIRST_BYTES) * statistics.median(tuple(self._per_byte))
        return seconds


class Hedge:
    """For one read: whether a second request is due."""

    def __init__(self, usual: Usual) -> None:
        self._usual = usual
        self._tries = 0
        self._tried_at = time.monotonic()

    def is_due(self, get: RangedGet, progress: Patience) -> bool:
        """Whether ``get`` takes MULTIPLE times as long as others, or makes no progress for TIMEOUT_S; if so, once."""
        now = time.monotonic()
        if now - self._tried_at < min(LEAST_S, patience.TIMEOUT_S):
            return False
        is_idle = now - max(self._tried_at, progress.since) >= patience.TIMEOUT_S
        limit_s = max(LEAST_S, MULTIPLE * self._usual.seconds(get)) * 2**self._tries
        if not is_idle and now - get.began < limit_s:
            return False
        self._tried_at = now
        self._tries += 1
        return True
