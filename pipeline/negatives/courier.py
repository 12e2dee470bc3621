"""The thread of a rank that talks to the shards while the step computes, and what it does when one of them is lost.

What survives what:

* A shard's process dies: it comes back empty. Rank 0 fills it, and every rank pushes again what the shard may have
  lost, which by its numbers takes effect once.
* A shard hangs: its calls are repeated for ``_LIMIT_S``, then the run ends with an error; it resumes.
* The worker group dies: the next one fills the shards anew, with what the run's checkpoint holds. The old group's
  calls are refused from then on.
"""

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.negatives.protocol import Shards, ShardsLostError
from pipeline.negatives.shard import ServiceError, Spec

_PROBE_S = 0.5  # an idle rank looks this often whether a shard came back empty
_RETRY_S = 0.1
_WAIT_S = 5.0  # of one call for other ranks' rows
_LIMIT_S = 120.0  # without a complete step: as long as a collective waits


@dataclass(frozen=True)
class HostCopy:
    """Tensors on their way from the step to the shards; on a GPU they are copied behind the step's back.

    Copies on the CPU too: the courier reads them, and may send them again, when their memory is used for other things.
    """

    tensors: tuple[Tensor, ...]
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, *tensors: Tensor) -> "HostCopy":
        """A copy of all of them, soon."""
        host = tuple(x.detach().contiguous().to("cpu", non_blocking=True, copy=True) for x in tensors)
        copied = None
        if any(x.is_cuda for x in tensors):
            copied = torch.cuda.Event()
            copied.record()
        return cls(host, copied)

    def arrived(self) -> tuple[Tensor, ...]:
        """The tensors in host memory."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensors


class Courier:
    """Runs jobs one after the other in a thread of its own; ``changed`` guards what a job and the step share."""

    def __init__(
        self,
        shards: Shards,
        spec: Spec,
        *,
        contents: Callable[[Collection[int]], Iterable[Sequence[Any]]],
        unsaved: Collection[Any],
    ) -> None:
        """All ranks together. ServiceError if the service is there for something else, or does not answer.

        Args:
            contents: of the shards with these indices; for each call of ``Shards.fill`` what every shard gets.
            unsaved: the pushes that ``contents`` may lack, in order; a view that the jobs keep up to date.
        """
        self.changed = threading.Condition()
        self.gauges = {"staleness": 0.0, "waited_ms": 0.0, "exchange_ms": 0.0, "step_bytes": 0.0, "duplicates": 0.0}
        self._shards, self._spec, self._contents, self._unsaved = shards, spec, contents, unsaved
        self._generation = distributed.broadcast_int(time.time_ns())
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._abandoned = False
        self._lives = self._open(time.monotonic() + _LIMIT_S)
        self._thread = threading.Thread(target=self._run, name="negatives", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the thread, after those before it."""
        self._jobs.put(job)

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        """In the step: until a job has brought it, with ``changed`` held. ServiceError once a job has failed."""
        started = time.perf_counter()
        self.changed.wait_for(lambda: self._failure is not None or is_there())
        if self._failure is not None:
            raise ServiceError(f"the negatives' service is lost to rank {distributed.rank()}: {self._failure}")
        self.gauges["waited_ms"] = 1e3 * (time.perf_counter() - started)

    def close(self) -> None:
        """End when all jobs are done. The shards stay as they are."""
        self._jobs.put(None)
        self._thread.join()

    def abandon(self) -> None:
        """End as soon as the current call returns, without waiting for it: other ranks may be gone."""
        self._abandoned = True
        self._jobs.put(None)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def exchange(
        self,
        pushes: Sequence[Any] = (),
        *,
        what: str = "an answer",
        requests: Callable[[], Sequence[Any]] | None = None,
        at_least: int = 0,
        take: Callable[[list[Any]], bool] = lambda answers: True,
    ) -> None:
        """Push, and ask until ``take`` says that the answers are all. ServiceError after ``_LIMIT_S``.

        Args:
            pushes: each has ``share(index, num_shards)``, what one shard gets of it.
            what: is waited for; for the error.
            requests: of each shard, made anew for every attempt; they are answered when ``at_least`` is complete.
        """
        indices = range(len(self._shards))
        started = time.monotonic()
        while not self._abandoned:
            if time.monotonic() > started + _LIMIT_S:
                raise ServiceError(
                    f"waited {_LIMIT_S:.0f} s in vain for {what}; a rank or a shard that hangs is the usual cause: "
                    "`python -m jobs.queue status` shows the shards"
                )
            try:
                replies = self._shards.exchange(
                    self._generation,
                    self._lives,
                    [[rows.share(index, len(indices)) for rows in pushes] for index in indices],
                    requests() if requests is not None else [None for _ in indices],
                    caller={"rank": distributed.rank(), **self.gauges},
                    at_least=at_least,
                    wait_s=_WAIT_S,
                )
            except ShardsLostError:
                self._lives = self._open(started + _LIMIT_S)
                pushes = list(self._unsaved)
                continue
            done = take([reply.answer for reply in replies])
            self.gauges["duplicates"] = float(sum(reply.duplicates for reply in replies))
            lives = [reply.life for reply in replies]
            if lives != self._lives:  # a shard came back between two calls, without what this rank had sent
                self._lives, pushes = lives, list(self._unsaved)
            elif done:
                self.gauges["exchange_ms"] = 1e3 * (time.monotonic() - started)
                return
            else:
                pushes = ()
        raise ServiceError("the step has been given up")

    def _run(self) -> None:
        try:
            while not self._abandoned:
                try:
                    job = self._jobs.get(timeout=_PROBE_S)
                except queue.Empty:
                    self.exchange()
                    continue
                if job is None:
                    return
                job()
        except Exception as error:  # noqa: BLE001 - raised again in the step, which waits for this thread
            with self.changed:
                self._failure = error
                self.changed.notify_all()

    def _open(self, deadline: float) -> list[int]:
        """Until all shards are this group's; rank 0 fills the empty ones. ServiceError after ``deadline``."""
        lost = "rank 0 has not filled them yet"
        while not self._abandoned:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"not all {self._spec.num_shards} shards are back after {_LIMIT_S:.0f} s; look for dead nodes with "
                    f"`ray status`, then submit the same config again: it resumes. The last answer: {lost}"
                )
            try:
                lives = self._shards.open(self._generation, self._spec)
                empty = [index for index, life in enumerate(lives) if life is None]
                if not empty:
                    return [life for life in lives if life is not None]
                if distributed.rank() == 0:
                    for contents in self._contents(empty):
                        self._shards.fill(self._generation, self._spec, contents)
                    continue
            except ShardsLostError as error:
                lost = str(error)
            time.sleep(_RETRY_S)
        raise ServiceError("the step has been given up")
