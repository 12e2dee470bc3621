"""A method's negatives, moved to the service for as long as a run lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.protocol import Shards
from pipeline.negatives.queue import MomentumQueue
from pipeline.negatives.served_bank import Checkpoints, ServedBank
from pipeline.negatives.served_queue import ServedQueue


@contextmanager
def negatives_service(
    shards: Shards, *, batch: int, max_staleness: int, checkpoints: Checkpoints
) -> Iterator[Callable[[nn.Module], None]]:
    """Yields what makes a method's queue or bank live on ``shards`` until the block ends; all ranks call it together.

    A queue's last state stays with the method; a bank's is in the checkpoint alone. See ``ServedQueue`` and
    ``ServedBank`` for the arguments and errors.
    """
    served: list[ServedQueue | ServedBank] = []

    def serve(method: nn.Module) -> None:
        for name, replica in list(method.named_children()):
            if isinstance(replica, MomentumQueue):
                served.append(ServedQueue(replica, shards, batch=batch, max_staleness=max_staleness))
            elif isinstance(replica, MemoryBank):
                served.append(ServedBank(replica, shards, checkpoints=checkpoints, name=name))
            else:
                continue
            setattr(method, name, served[-1])

    try:
        yield serve
    except BaseException:
        for negatives in served:
            negatives.abandon()
        raise
    for negatives in served:
        negatives.close()
