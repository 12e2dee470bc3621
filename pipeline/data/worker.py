"""A loader worker: a process of its own that fills rows of shared batches.

Started by pipeline/data/loader.py, which calls ``main`` with three inherited file descriptors in ``sys.argv``. A
fresh interpreter, not a fork and not a copy of ``__main__``: s3fs is not fork-safe, and under Ray ``__main__`` is
Ray's. It imports no torch, starts in 0.8 s and holds some 90 MB of its own. It ends when its connection does,
whatever it is doing, so no way of killing the trainer leaves a worker behind.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import cv2

from pipeline.data.assemble import Assembler, BadSample, Rows
from pipeline.data.manifest import Manifest, Samples, Shards
from pipeline.data.mirror import MirrorConfig
from pipeline.data.shared import Layout, attach
from pipeline.waiting import told_to


@dataclass(frozen=True)
class Job:
    """What a worker is told once."""

    url: str
    digest: str
    shards: Shards
    rows: Rows
    mirror: MirrorConfig | None
    first_row: int  # of the shared batches, in the global batch
    columns: Layout  # of Samples, all splits
    slots: list[Layout]  # per slot: the views of the rank's rows, then their ids


@dataclass(frozen=True)
class Order:
    """Fill your rows of a step into a slot."""

    step: int
    end_step: int
    slot: int


@dataclass(frozen=True)
class Done:
    """Your order is done; these samples were bad."""

    step: int
    bad: list[BadSample]


@dataclass(frozen=True)
class Note:
    """What this worker waits for."""

    line: str


def main() -> None:
    """Serve orders until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides
    connection_fd, columns_fd, slots_fd = map(int, sys.argv[1:4])
    cv2.setNumThreads(0)
    connection = Connection(connection_fd)
    try:
        job: Job = connection.recv()
    except EOFError:
        return
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    sending = threading.Lock()

    def send(message: Done | Note | Exception) -> None:
        with sending:  # two threads do
            connection.send(message)

    try:
        with told_to(lambda line: send(Note(line))):
            _serve(job, columns_fd, slots_fd, orders, send)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except Exception as error:  # noqa: BLE001  whatever it is, the trainer raises it
        send(error)
        threading.Event().wait()  # until _listen sees the end


def _serve(
    job: Job, columns_fd: int, slots_fd: int, orders: "queue.SimpleQueue[Order]", send: Callable[[Done], None]
) -> None:
    shard, offset, length, crc32, label = attach(columns_fd, job.columns)
    samples = Samples(0, shard, offset, length, crc32, label)
    assembler = Assembler(Manifest(job.url, (), job.shards, samples, job.digest), job.rows, job.mirror)
    mine = slice(job.rows.start - job.first_row, job.rows.end - job.first_row)
    arrays = iter(attach(slots_fd, [each for layout in job.slots for each in layout]))
    slots = [[next(arrays) for _ in layout] for layout in job.slots]
    while True:
        order = orders.get()
        *views, ids = slots[order.slot]
        bad = assembler.fill(order.step, order.end_step, [view[mine] for view in views], ids[mine])
        send(Done(order.step, bad))


def _listen(connection: Connection, orders: "queue.SimpleQueue[Order]") -> None:
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
