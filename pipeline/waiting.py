"""Nothing waits in silence: who waits says for what, and a wait of more than 10 s is told every 10 s.

One thread per process looks at all waits once a second, so 32 readers of one dead store tell one line, not 32.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

TELL_EVERY_S = 10.0  # and the age at which a wait is told first
_LISTED = 3  # waits in a line, the oldest first

_log = logging.getLogger(__name__)


class Waiting:
    """Around whatever may block: ``with Waiting(lambda: "the batch of step 7"):``."""

    def __init__(self, reason: Callable[[], str]) -> None:
        """``reason`` says what is waited for; it is called from another thread, and only if the wait is long."""
        self.reason = reason
        self.since = time.monotonic()  # whoever sees that it moves on sets it anew

    def __enter__(self) -> Self:
        with _lock:
            _waits.add(self)
            if not _watchers:
                _watchers.append(threading.Thread(target=_watch, name="parallax-waits", daemon=True))
                _watchers[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _waits.remove(self)


_waits: set[Waiting] = set()
_lock = threading.Lock()
_watchers: list[threading.Thread] = []
_tell: Callable[[str], object] = _log.warning


@contextmanager
def told_to(tell: Callable[[str], object]) -> Iterator[None]:
    """``tell`` is given the lines instead of the log, in the thread that watches."""
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


def _watch() -> None:
    told_at = 0.0
    while True:
        time.sleep(TELL_EVERY_S / 10)
        now = time.monotonic()
        if now - told_at >= TELL_EVERY_S and (line := _line(now)):
            told_at = now
            _tell(line)


def _line(now: float) -> str:
    """The oldest waits, if one is old enough to be told; what else is under way may be why."""
    with _lock:
        waits = sorted(_waits, key=lambda wait: wait.since)
    if not waits or now - waits[0].since < TELL_EVERY_S:
        return ""
    reasons = "; ".join(f"{now - wait.since:.0f} s for {wait.reason()}" for wait in waits[:_LISTED])
    more = f"; and {len(waits) - _LISTED} more" if len(waits) > _LISTED else ""
    return f"waiting {reasons}{more}"
