"""How long a read of a shard may take: as long as it moves on.

A connection of which a byte comes now and then is as dead as one of which none comes: 32 MiB at 1 kB/s are nine hours.
So patience is renewed by a rate, never by a byte.
"""

import random
import time

from pipeline.storage import StorageError
from pipeline.waiting import Waiting

PATIENCE_S = 60.0  # without progress; an object store may restart meanwhile
TIMEOUT_S = 5.0  # of a connect, and without progress before a second request is sent
# Of one read, over TIMEOUT_S: less is no progress. A home link of 200 kB/s leaves 6 kB/s to each of the 32 connections
# of 8 loader workers.
MIN_BYTES_PER_S = 4000.0
_PAUSE_S, _MAX_PAUSE_S = 0.1, 5.0


class Patience(Waiting):
    """How one read gets on; ``since``: when there was progress last."""

    def __init__(self, url: str, size: int) -> None:
        """``size``: the bytes to read."""
        super().__init__(self.describe)
        self._url, self._size = url, size
        self._began = self._window_at = self.since
        self._received = self._in_window = self._failures = 0
        self._last = ""

    def got(self, count: int) -> None:
        """``count`` bytes came, perhaps none; StorageError where too few have come for too long."""
        now = time.monotonic()
        self._received += count
        self._in_window += count
        if self._in_window >= MIN_BYTES_PER_S * TIMEOUT_S:
            self.since = now
            self._failures, self._last = 0, ""
        elif now - self._window_at < TIMEOUT_S:
            return
        self._window_at, self._in_window = now, 0
        self._check()

    def failed(self, error: Exception) -> None:
        """A request came to nothing."""
        self._failures += 1
        self._last = f", {self._failures} failed, the last with {type(error).__name__}: {error}"

    def pause(self, error: Exception, at_least_s: float = 0.0) -> None:
        """Sleep for a random share of a limit that doubles with each failure; StorageError when no time is left.

        ``at_least_s``: as the store has asked for; the patience bounds it, and the store is asked once more at its end.
        """
        self.failed(error)
        self._check(error)
        pause = at_least_s + random.uniform(0, min(_PAUSE_S * 2**self._failures, _MAX_PAUSE_S))
        time.sleep(min(pause, max(self.since + PATIENCE_S - time.monotonic(), 0)))

    def describe(self) -> str:
        """Which shard, how much of it has come how fast, what went wrong."""
        seconds = time.monotonic() - self._began
        return (
            f"{self._url}: {_readable(self._received)} of {_readable(self._size)} in {seconds:.0f} s, "
            f"{_readable(self._received / max(seconds, 1e-3))}/s{self._last}"
        )

    def _check(self, cause: Exception | None = None) -> None:
        idle_s = time.monotonic() - self.since
        if idle_s >= PATIENCE_S and self._failures > 1:  # one alone: this process may have been stopped meanwhile
            raise StorageError(
                f"{self.describe()}; for {idle_s:.0f} s less than {_readable(MIN_BYTES_PER_S)}/s came, too little to "
                "wait for; is the endpoint up, and reachable from here at a usable speed?"
            ) from cause


def _readable(count: float) -> str:
    """A number of bytes for a person: 0.9 kB, 31.5 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
