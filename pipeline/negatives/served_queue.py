"""The queue whose keys travel through a service: every rank keeps a replica to read, shards keep and number the keys.

A step's loss reads the replica, at memory speed. Meanwhile the courier pushes the rank's new keys and pulls what other
ranks pushed, in complete steps only, so that all ranks see the same rows. With a staleness of 0 the next step waits
for all keys of this one, and the replica is, bit for bit, the local queue. A lost shard is filled from rank 0's.
"""

from collections import deque
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.negatives.courier import Courier, HostCopy
from pipeline.negatives.protocol import Shards
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.queue_shard import QueueSpec, Rows, own_numbers
from pipeline.negatives.shard import ServiceError


class ServedQueue(MomentumQueue):
    """A replica with the buffers of the queue it replaces, so that checkpoints fit either.

    The state is read when it has caught up with the last step; it cannot be loaded: restore first, then serve.
    """

    def __init__(self, replica: MomentumQueue, shards: Shards, *, batch: int, max_staleness: int) -> None:
        """All ranks together. ``batch``: keys of a step over all ranks; ``max_staleness`` in steps.

        ServiceError if the service is there for another queue, or does not answer.
        """
        nn.Module.__init__(self)  # not the parent's, which would draw random keys
        for name, buffer in replica.named_buffers():
            self.register_buffer(name, buffer)
        self._batch, self._max_staleness = batch, max_staleness
        # A shard that rank 0 fills again is at most max_staleness + 1 steps behind the newest push of any rank.
        steps_in_flight = max_staleness + 3
        size, dim = self.keys.shape
        if size < (max_staleness + 1) * batch:  # a rank that lags would find its next keys overwritten
            raise ServiceError(
                f"a queue of {size} keys is smaller than the {max_staleness + 1} steps of {batch} that a replica may "
                "lag; use method.queue_size or negatives.max_staleness to match"
            )
        dtype = str(self.keys.dtype).removeprefix("torch.")
        self._spec = QueueSpec(size, dim, dtype, batch, len(shards), steps_in_flight)
        self._sent = self._applied = self._pulled = int(self.written)
        self._recent: deque[Rows] = deque(maxlen=steps_in_flight)  # this rank's last pushes, in case they are lost
        self._arrived: list[tuple[Tensor, Tensor]] = []
        self._courier = Courier(shards, self._spec, contents=self._contents, unsaved=self._recent)
        self.register_state_dict_pre_hook(lambda *_: self._catch_up())

    def negatives(self) -> Tensor:
        """(K, D), once the replica lags by at most ``max_staleness`` steps. ServiceError if that takes too long."""
        self._take(self._sent - self._max_staleness * self._batch)
        self._courier.gauges["staleness"] = (self._sent - self._applied) / self._batch
        return self.keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor, sample_ids: Tensor) -> None:
        """Give this rank's keys to the courier; the step goes on."""
        if len(keys) * distributed.world_size() != self._batch:
            raise ServiceError(
                f"{len(keys)} keys of each of {distributed.world_size()} ranks are not the {self._batch} of a step"
            )
        if keys.shape[1] != self._spec.dim:
            raise ServiceError(f"keys of {keys.shape[1]} numbers do not fit a queue of {self._spec.dim}")
        start = self._sent + distributed.rank() * len(keys)
        self._sent += self._batch
        at_least = self._sent - self._max_staleness * self._batch
        copy = HostCopy.of(keys.to(self.keys.dtype), sample_ids)
        self._courier.submit(lambda: self._push(start, copy, at_least))

    def enqueued(self) -> int:
        """The keys handed over so far, in the replica or on their way."""
        return self._sent

    def gauges(self) -> dict[str, float]:
        """Fill and mean age of the keys, staleness in steps, time the step waited and an exchange took, bytes."""
        own = {f"queue/{name}": value for name, value in self._courier.gauges.items()}
        filled = min(self._applied, self._spec.size)
        age = self._courier.gauges["staleness"] + filled / self._batch / 2
        return super().gauges() | own | {"queue/step": self._applied / self._batch, "queue/mean_age_steps": age}

    def close(self) -> None:
        """Take all ranks' keys of the last step, then end the courier. The shards stay as they are."""
        self._catch_up()
        self._courier.close()

    def abandon(self) -> None:
        """See ``Courier.abandon``."""
        self._courier.abandon()

    def _catch_up(self) -> None:
        if self._applied < self._sent:
            sent = self._sent
            self._courier.submit(lambda: self._exchange([], sent))
            self._take(sent)

    def _take(self, at_least: int) -> None:
        """Wait for the keys below ``at_least``, then write all that have come into the replica."""
        with self._courier.changed:
            self._courier.wait_for(lambda: self._pulled >= at_least)
            for keys, sample_ids in self._arrived:
                self.write(keys, sample_ids)
            self._arrived.clear()
            self._applied = self._pulled

    # --- in the courier's thread ------------------------------------------------------------------------------------

    def _push(self, start: int, copy: HostCopy, at_least: int) -> None:
        keys, sample_ids = copy.arrived()
        rows = Rows(start, start + len(keys), keys.view(torch.uint8).numpy(), sample_ids.numpy())
        self._recent.append(rows)
        self._exchange([rows], at_least)

    def _exchange(self, pushes: list[Rows], at_least: int) -> None:
        self._courier.exchange(
            pushes,
            what=f"the keys below {at_least}",
            requests=lambda: [self._pulled] * self._spec.num_shards,
            at_least=at_least,
            take=lambda parts: self._deliver(parts) >= at_least,
        )

    def _deliver(self, parts: list[Rows]) -> int:
        """Hand the step the keys that all shards have; the number that they reach."""
        start, stop = self._pulled, min(part.stop for part in parts)
        if stop <= start:
            return start
        keys = torch.empty(stop - start, self._spec.row_bytes, dtype=torch.uint8, pin_memory=self.keys.is_cuda)
        sample_ids = torch.empty(stop - start, dtype=torch.int64)
        for index, part in enumerate(parts):
            mine = own_numbers(start, stop, index, self._spec.num_shards)
            count = len(range(start, stop)[mine])
            keys.numpy()[mine] = part.keys[:count]
            sample_ids.numpy()[mine] = part.sample_ids[:count]
        with self._courier.changed:
            self._arrived.append((keys.view(self.keys.dtype), sample_ids))
            self._pulled = stop
            self._courier.gauges["step_bytes"] = float(sum(part.keys.nbytes for part in parts))
            self._courier.changed.notify_all()
        return stop

    def _contents(self, empty: Collection[int]) -> Iterator[list[Rows | None]]:
        """The replica, oldest key first, by shard."""
        size, stop = self._spec.size, self._applied
        order = torch.arange(stop - size, stop) % size
        keys, sample_ids = self.keys.cpu()[order].view(torch.uint8).numpy(), self.sample_ids.cpu()[order].numpy()
        whole = Rows(stop - size, stop, keys, sample_ids)
        count = self._spec.num_shards
        yield [whole.share(index, count) if index in empty else None for index in range(count)]
