"""The queue whose keys travel through a service: every rank keeps a replica to read, shards keep and number the keys.

A step's loss reads the replica, at memory speed. Meanwhile a thread of this process pushes the rank's new keys and
pulls what other ranks pushed, in complete steps only, so that all ranks see the same rows. With a staleness of 0 the
next step waits for all keys of this one, and the replica is, bit for bit, the local queue.

What survives what:

* A shard's process dies: it comes back empty. Rank 0 fills it from its replica, and every rank sends its last steps
  again, which by their numbers take effect once.
* The worker group dies: the next one opens the shards anew with the queue of the run's checkpoint. The old group's
  calls are refused from then on.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.negatives.protocol import Shards, ShardsLostError
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.shard import QueueError, QueueSpec, Rows, own_numbers

_PROBE_S = 0.5  # an idle rank looks this often whether a shard came back empty
_RETRY_S = 0.1
_WAIT_S = 5.0  # of one call for other ranks' keys
_LIMIT_S = 120.0  # without a complete step: as long as a collective waits


@dataclass(frozen=True)
class _Keys:
    """Keys on their way from the step to the shards; on a GPU they are copied behind the step's back."""

    start: int
    keys: Tensor  # (B, D), the queue's dtype, in host memory once ``copied`` has happened
    sample_ids: Tensor
    copied: torch.cuda.Event | None

    def rows(self) -> Rows:
        if self.copied is not None:
            self.copied.synchronize()
        return Rows(
            self.start, self.start + len(self.keys), self.keys.view(torch.uint8).numpy(), self.sample_ids.numpy()
        )


class ServedQueue(MomentumQueue):
    """A replica with the buffers of the queue it replaces, so that checkpoints fit either.

    The state is read when it has caught up with the last step; it cannot be loaded: restore first, then serve.
    """

    def __init__(self, replica: MomentumQueue, shards: Shards, *, batch: int, max_staleness: int) -> None:
        """All ranks together. ``batch``: keys of a step over all ranks; ``max_staleness`` in steps.

        QueueError if the service is there for another queue, or does not answer.
        """
        nn.Module.__init__(self)  # not the parent's, which would draw random keys
        for name, buffer in replica.named_buffers():
            self.register_buffer(name, buffer)
        self._shards, self._batch, self._max_staleness = shards, batch, max_staleness
        # A shard that rank 0 fills again is at most max_staleness + 1 steps behind the newest push of any rank.
        steps_in_flight = max_staleness + 3
        size, dim = self.keys.shape
        if size < (max_staleness + 1) * batch:  # a rank that lags would find its next keys overwritten
            raise QueueError(
                f"a queue of {size} keys is smaller than the {max_staleness + 1} steps of {batch} that a replica may "
                "lag; use method.queue_size or negatives.max_staleness to match"
            )
        dtype = str(self.keys.dtype).removeprefix("torch.")
        self._spec = QueueSpec(size, dim, dtype, batch, len(shards), steps_in_flight)
        self._generation = distributed.broadcast_int(time.time_ns())
        self._sent = self._applied = self._pulled = int(self.written)
        self._recent: deque[Rows] = deque(maxlen=steps_in_flight)  # this rank's last pushes, in case they are lost
        self._outbox: queue.SimpleQueue[tuple[_Keys | None, int] | None] = queue.SimpleQueue()
        self._arrived: list[tuple[Tensor, Tensor]] = []
        self._changed = threading.Condition()  # guards what both threads touch: _arrived, _pulled, the replica
        self._failure: Exception | None = None
        self._abandoned = False
        self._gauges = {"staleness": 0.0, "waited_ms": 0.0, "exchange_ms": 0.0, "step_bytes": 0.0, "duplicates": 0.0}
        self._lives = self._open(time.monotonic() + _LIMIT_S)
        self.register_state_dict_pre_hook(lambda *_: self._catch_up())
        self._courier = threading.Thread(target=self._carry, name="negatives", daemon=True)
        self._courier.start()

    def negatives(self) -> Tensor:
        """(K, D), once the replica lags by at most ``max_staleness`` steps. QueueError if that takes too long."""
        self._take(self._sent - self._max_staleness * self._batch)
        self._gauges["staleness"] = (self._sent - self._applied) / self._batch
        return self.keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor, sample_ids: Tensor) -> None:
        """Give this rank's keys to the courier; the step goes on."""
        if len(keys) * distributed.world_size() != self._batch:
            raise QueueError(
                f"{len(keys)} keys of each of {distributed.world_size()} ranks are not the {self._batch} of a step"
            )
        if keys.shape[1] != self._spec.dim:
            raise QueueError(f"keys of {keys.shape[1]} numbers do not fit a queue of {self._spec.dim}")
        start = self._sent + distributed.rank() * len(keys)
        self._sent += self._batch
        keys = keys.detach().to(self.keys.dtype).contiguous()
        # copies on the CPU too: the courier reads them, and may send them again, when the loader has reused its memory
        host, ids = (x.to("cpu", non_blocking=True, copy=True) for x in (keys, sample_ids))
        copied = None
        if keys.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._outbox.put((_Keys(start, host, ids, copied), self._sent - self._max_staleness * self._batch))

    def enqueued(self) -> int:
        """The keys handed over so far, in the replica or on their way."""
        return self._sent

    def gauges(self) -> dict[str, float]:
        """Fill and mean age of the keys, staleness in steps, time the step waited and an exchange took, bytes."""
        own = {f"queue/{name}": value for name, value in self._gauges.items()}
        filled = min(self._applied, self._spec.size)
        age = self._gauges["staleness"] + filled / self._batch / 2
        return super().gauges() | own | {"queue/step": self._applied / self._batch, "queue/mean_age_steps": age}

    def close(self) -> None:
        """Take all ranks' keys of the last step, then end the courier. The shards stay as they are."""
        self._catch_up()
        self._outbox.put(None)
        self._courier.join()

    def abandon(self) -> None:
        """End the courier as soon as its call returns, without waiting for it: other ranks may be gone."""
        self._abandoned = True
        self._outbox.put(None)

    def _catch_up(self) -> None:
        if self._applied < self._sent:
            self._outbox.put((None, self._sent))
            self._take(self._sent)

    def _take(self, at_least: int) -> None:
        """Wait for the keys below ``at_least``, then write all that have come into the replica."""
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._pulled >= at_least)
            if self._failure is not None:
                raise QueueError(f"the queue service is lost to rank {distributed.rank()}: {self._failure}")
            self._gauges["waited_ms"] = 1e3 * (time.perf_counter() - started)
            for keys, sample_ids in self._arrived:
                self.write(keys, sample_ids)
            self._arrived.clear()
            self._applied = self._pulled

    # --- the courier's thread ---------------------------------------------------------------------------------------

    def _carry(self) -> None:
        try:
            while True:
                try:
                    order = self._outbox.get(timeout=_PROBE_S)
                except queue.Empty:
                    self._exchange([], self._pulled)
                    continue
                if order is None:
                    return
                keys, at_least = order
                fresh = [keys.rows()] if keys is not None else []
                self._recent.extend(fresh)
                self._exchange(fresh, at_least)
        except Exception as error:  # noqa: BLE001 - raised again in the step, which waits for this thread
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _exchange(self, pushes: list[Rows], at_least: int) -> None:
        """Until all keys below ``at_least`` are here. QueueError after ``_LIMIT_S``."""
        started = time.monotonic()
        while not self._abandoned:
            if time.monotonic() > started + _LIMIT_S:
                raise QueueError(
                    f"the keys below {at_least} are due for {_LIMIT_S:.0f} s, those below {self._pulled} came; a "
                    "rank or a shard that hangs is the usual cause: `python -m jobs.queue status` shows the shards"
                )
            try:
                replies = self._shards.exchange(
                    self._generation,
                    self._lives,
                    self._shares(pushes),
                    caller={"rank": distributed.rank(), **self._gauges},
                    start=self._pulled,
                    at_least=at_least,
                    wait_s=_WAIT_S,
                )
            except ShardsLostError:
                self._lives = self._open(started + _LIMIT_S)
                pushes = list(self._recent)
                continue
            self._deliver([reply.rows for reply in replies])
            self._gauges["duplicates"] = float(sum(reply.duplicates for reply in replies))
            lives = [reply.life for reply in replies]
            if lives != self._lives:  # a shard came back between two calls, without what this rank had sent
                self._lives, pushes = lives, list(self._recent)
            elif self._pulled >= at_least:
                self._gauges["exchange_ms"] = 1e3 * (time.monotonic() - started)
                return
            else:
                pushes = []

    def _shares(self, pushes: list[Rows]) -> list[list[Rows]]:
        """``pushes`` by shard."""
        return [[_share(rows, index, self._spec.num_shards) for rows in pushes] for index in self._indices]

    def _deliver(self, parts: list[Rows]) -> None:
        """Hand the step the keys that all shards have."""
        start, stop = self._pulled, min(part.stop for part in parts)
        if stop <= start:
            return
        keys = torch.empty(stop - start, self._spec.row_bytes, dtype=torch.uint8, pin_memory=self.keys.is_cuda)
        sample_ids = torch.empty(stop - start, dtype=torch.int64)
        for index, part in enumerate(parts):
            mine = own_numbers(start, stop, index, self._spec.num_shards)
            count = len(range(start, stop)[mine])
            keys.numpy()[mine] = part.keys[:count]
            sample_ids.numpy()[mine] = part.sample_ids[:count]
        with self._changed:
            self._arrived.append((keys.view(self.keys.dtype), sample_ids))
            self._pulled = stop
            self._gauges["step_bytes"] = float(sum(part.keys.nbytes for part in parts))
            self._changed.notify_all()

    def _open(self, deadline: float) -> list[int]:
        """Until all shards hold this group's queue; rank 0 fills the empty ones. QueueError after ``deadline``."""
        while True:
            contents = self._contents() if distributed.rank() == 0 else [None for _ in self._indices]
            try:
                return self._shards.open(self._generation, self._spec, contents)
            except ShardsLostError as error:
                if time.monotonic() > deadline:
                    raise QueueError(
                        f"not all {self._spec.num_shards} shards of the queue are back after {_LIMIT_S:.0f} s; look "
                        "for dead nodes with `ray status`, then submit the same config again: it resumes. "
                        f"The last answer: {error}"
                    ) from error
                time.sleep(_RETRY_S)

    def _contents(self) -> list[Rows]:
        """The replica, oldest key first, by shard."""
        with self._changed:
            size, stop = self._spec.size, self._applied
            order = torch.arange(stop - size, stop) % size
            keys, sample_ids = self.keys.cpu()[order].view(torch.uint8).numpy(), self.sample_ids.cpu()[order].numpy()
        whole = Rows(stop - size, stop, keys, sample_ids)
        return [_share(whole, index, self._spec.num_shards) for index in self._indices]

    @property
    def _indices(self) -> range:
        return range(self._spec.num_shards)


@contextmanager
def queue_service(shards: Shards, *, batch: int, max_staleness: int) -> Iterator[Callable[[nn.Module], None]]:
    """Yields what makes a method's queue travel through ``shards`` until the block ends; all ranks call it together.

    See ``ServedQueue`` for the arguments and errors.
    """
    served: list[tuple[nn.Module, MomentumQueue, ServedQueue]] = []

    def serve(method: nn.Module) -> None:
        replica = method.get_submodule("queue")
        assert isinstance(replica, MomentumQueue)
        method.queue = ServedQueue(replica, shards, batch=batch, max_staleness=max_staleness)
        served.append((method, replica, method.queue))

    try:
        yield serve
    except BaseException:
        for _, _, queue in served:
            queue.abandon()
        raise
    for method, replica, queue in served:
        queue.close()
        method.queue = replica  # it has the same buffers


def _share(rows: Rows, index: int, num_shards: int) -> Rows:
    """What shard ``index`` gets of ``rows``."""
    mine = own_numbers(rows.start, rows.stop, index, num_shards)
    return Rows(rows.start, rows.stop, rows.keys[mine], rows.sample_ids[mine])
