"""Batches of one rank, uint8 on the CPU, from worker processes that write into shared memory.

The order is pipeline/data/plan.py's; the number of ranks and workers decides who makes which rows and nothing
else. Memory per rank: three batches of views, plus 5/4 x MAX_LANES x (BLOCK_BYTES + CHUNK_BYTES) / world_size of
encoded images, and the same again while an epoch ends and the next one's first blocks are read.
"""

import functools
import itertools
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.assemble import (
    MAX_BAD_SHARE,
    Assembler,
    BadSample,
    BadSamplesError,
    Rows,
    list_of,
)
from pipeline.data.augment import Augmenter, write_planes
from pipeline.data.batch import Batch
from pipeline.data.decode import decode
from pipeline.data.fetch import open_fetch
from pipeline.data.headers import UndecodableError
from pipeline.data.manifest import Manifest, Samples
from pipeline.data.mirror import MirrorConfig, MirrorFetch
from pipeline.data.plan import Plan, Run, uniform_rows
from pipeline.data.reader import SampleReader
from pipeline.data.resize import Pixels, resized_crop
from pipeline.data.shared import Layout, allocate, attach
from pipeline.data.views import View
from pipeline.data.worker import Done, Job, Note, Order
from pipeline.waiting import Waiting

_SLOTS = 3  # batches in the making or waiting; more would only help where a step's time varies wildly
_STOP_S = 5
_WORKER = "from pipeline.data.worker import main; main()"  # as `-m` its classes would be pickled as __main__'s
_READ_BYTES = 8 * 2**20  # per request when reading in id order

_log = logging.getLogger(__name__)


class WorkerError(Exception):
    """A loader worker died."""


class Loader:
    """The batches of one rank, at any step."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        views: Sequence[View],
        *,
        image_size: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        mirror: MirrorConfig | None = None,
        colour: bool = True,
        pin_memory: bool = False,
    ) -> None:
        """``num_workers`` processes make this rank's rows; 0 = the calling process. ``mirror``: keep what is
        read on a local disk. ``colour=False``: leave all but crop and flip to ``DeviceColour``, with the same draws.
        ``pin_memory``: views that go to a GPU without waiting.

        ValueError where the batch does not fit the split or the world size.
        """
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size={global_batch_size} does not divide by world_size={world_size}")
        self._manifest = manifest
        plan = Plan(manifest.shards, split, global_batch_size, seed)
        self.steps_per_epoch = plan.steps_per_epoch
        self.remainder = plan.remainder  # samples that an epoch leaves out; which ones, rotates
        self.quarantine: dict[int, BadSample] = {}  # by sample id: met so far by this rank, each replaced by another
        per_rank = global_batch_size // world_size
        self._rows = Rows(
            split=split,
            views=tuple(views),
            image_size=image_size,
            global_batch_size=global_batch_size,
            seed=seed,
            start=rank * per_rank,
            end=(rank + 1) * per_rank,
            colour=colour,
        )
        augmenter = Augmenter(views, image_size)
        self._sizes, self._num_uniforms = augmenter.sizes, augmenter.num_uniforms
        self._num_workers = min(num_workers, per_rank)
        self._mirror = mirror
        self._pin_memory = pin_memory

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of global steps [start_step, end_step): views (B / W, 3, S, S) uint8, epoch after epoch.

        Raises StorageError where a shard cannot be read or is damaged, BadSamplesError where not one of a block's
        samples can be decoded, WorkerError where a worker is killed. Closing the iterator ends the workers.
        """
        if self._num_workers == 0:
            return self._batches_here(start_step, end_step)
        return self._batches_of_workers(start_step, end_step)

    def _batches_here(self, start_step: int, end_step: int) -> Iterator[Batch]:
        assembler = Assembler(self._manifest, self._rows, self._mirror)
        try:
            for step in range(start_step, end_step):
                views, ids = self._empty()
                self._note(assembler.fill(step, end_step, [view.numpy() for view in views], ids.numpy()))
                yield Batch(views, ids, self._draws(step))
        finally:
            assembler.close()

    def _batches_of_workers(self, start_step: int, end_step: int) -> Iterator[Batch]:
        with _Workers(self._manifest, self._rows, self._sizes, self._num_workers, self._mirror) as workers:
            for step in range(start_step, min(start_step + _SLOTS, end_step)):
                workers.order(step, end_step)
            for step in range(start_step, end_step):
                self._note(workers.wait_for(step))
                views, ids = self._empty()
                for ours, shared in zip([*views, ids], workers.filled(step), strict=True):
                    ours.numpy()[:] = shared
                if step + _SLOTS < end_step:
                    workers.order(step + _SLOTS, end_step)
                yield Batch(views, ids, self._draws(step))

    def _empty(self) -> tuple[list[Tensor], Tensor]:
        """Memory for a batch: views (n, 3, S, S) uint8 and sample ids (n,)."""
        n = self._rows.end - self._rows.start
        views = [torch.empty(n, 3, size, size, dtype=torch.uint8, pin_memory=self._pin_memory) for size in self._sizes]
        return views, torch.empty(n, dtype=torch.int64, pin_memory=self._pin_memory)

    def _draws(self, step: int) -> Tensor | None:
        """What ``DeviceColour`` needs at ``step``: the rows of the table that the assemblers draw from."""
        if self._rows.colour:
            return None
        epoch, local = divmod(step, self.steps_per_epoch)
        first, count = local * self._rows.global_batch_size + self._rows.start, self._rows.end - self._rows.start
        uniforms = uniform_rows(self._rows.seed, epoch, first, count, self._num_uniforms)
        return torch.from_numpy(uniforms).float().reshape(count, len(self._sizes), -1)

    def _note(self, bad: list[BadSample]) -> None:
        self.quarantine.update((sample.sample_id, sample) for sample in bad)


class _Workers:
    """The worker processes of one pass and the batches they share."""

    def __init__(
        self, manifest: Manifest, rows: Rows, sizes: list[int], count: int, mirror: MirrorConfig | None
    ) -> None:
        n = rows.end - rows.start
        slot: Layout = [*(((n, 3, size, size), "uint8") for size in sizes), ((n,), "int64")]
        table = manifest.samples
        columns: list[NDArray[Any]] = [table.shard, table.offset, table.length, table.crc32, table.label]
        columns_layout: Layout = [(column.shape, column.dtype.str) for column in columns]
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._undone: dict[int, set[int]] = {}  # step -> the places of the workers that are at it
        self._notes: dict[int, str] = {}  # by place: what a worker waits for
        self._bad: list[BadSample] = []
        with ExitStack() as stack:
            columns_fd, slots_fd = allocate(columns_layout), allocate(slot * _SLOTS)
            stack.callback(os.close, columns_fd)
            stack.callback(os.close, slots_fd)
            for shared, column in zip(attach(columns_fd, columns_layout), columns, strict=True):
                shared[:] = column
            arrays = attach(slots_fd, slot * _SLOTS)
            self._slots = [arrays[at : at + len(slot)] for at in range(0, len(arrays), len(slot))]
            edges = np.linspace(rows.start, rows.end, count + 1).round().astype(int).tolist()
            stack.push(lambda kind, *_: self.close() if kind else None)
            for start, end in itertools.pairwise(edges):
                job = Job(
                    url=manifest.url,
                    digest=manifest.digest,
                    shards=manifest.shards,
                    rows=replace(rows, start=start, end=end),
                    mirror=mirror,
                    first_row=rows.start,
                    columns=columns_layout,
                    slots=[slot] * _SLOTS,
                )
                self._start(job, columns_fd, slots_fd)

    def _start(self, job: Job, columns_fd: int, slots_fd: int) -> None:
        ours, theirs = Pipe()
        with theirs:
            fds = (theirs.fileno(), columns_fd, slots_fd)
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if sys.stderr else None,
                pass_fds=fds,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # Ray edits sys.path
                    "OPENCV_LOG_LEVEL": "SILENT",  # bad images are quarantined and reported, not printed
                },
            )
        self._connections.append(ours)
        self._processes.append(process)
        with Waiting(lambda: f"loader worker {process.pid} to start"):
            ours.send(job)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; they exit by themselves when their connection closes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def order(self, step: int, end_step: int) -> None:
        """Have every worker fill its rows of ``step``."""
        self._undone[step] = set(range(len(self._processes)))
        for process, connection in zip(self._processes, self._connections, strict=True):
            try:
                connection.send(Order(step, end_step, step % _SLOTS))
            except OSError as error:
                raise self._died(process) from error

    def wait_for(self, step: int) -> list[BadSample]:
        """Wait until ``step`` is filled; the bad samples met since the last call."""
        with Waiting(lambda: self._describe(step)):
            while self._undone[step]:
                ready = set(wait(self._connections))
                for place, connection in enumerate(self._connections):
                    if connection in ready:
                        self._receive(place)
        del self._undone[step]
        bad, self._bad = self._bad, []
        return bad

    def _receive(self, place: int) -> None:
        """Take in what the worker at ``place`` says."""
        try:
            message: Done | Note | Exception = self._connections[place].recv()
        except (EOFError, OSError) as error:
            raise self._died(self._processes[place]) from error
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Note):
            self._notes[place] = message.line
            return
        self._notes.pop(place, None)
        self._undone[message.step].discard(place)
        self._bad += message.bad

    def _describe(self, step: int) -> str:
        """Who is at a step still, and why; called from another thread."""
        at_it = sorted(self._undone.get(step, ()))
        pids = ", ".join(str(self._processes[place].pid) for place in at_it)
        notes = [f" ({self._processes[place].pid}: {note})" for place in at_it if (note := self._notes.get(place))]
        return f"the batch of step {step} from the loader workers {pids}{''.join(notes[:1])}"

    def filled(self, step: int) -> list[NDArray[Any]]:
        """The views and the sample ids of a filled step, until its slot is ordered again."""
        return self._slots[step % _SLOTS]

    def _died(self, process: subprocess.Popen[bytes]) -> WorkerError:
        code = process.wait(_STOP_S)
        why = "killed, often for want of memory" if code == -9 else "see its output above"
        return WorkerError(f"loader worker {process.pid} died with exit code {code}: {why}")


def read_images(
    manifest: Manifest, split: str, image_size: int, batch_size: int = 256, max_bad_share: float = MAX_BAD_SHARE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids int64 (N,), images uint8 (N, 3, S, S), labels int64 (N,), -1 = none) in id order, resized, centre-cropped.

    N is ``batch_size`` but for the last. Samples that cannot be decoded are left out, with a warning each;
    BadSamplesError above ``max_bad_share`` of the split.
    """
    samples = manifest.split(split)
    ids: list[int] = []
    images: list[NDArray[np.uint8]] = []
    bad: list[BadSample] = []

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        labels = samples.label[np.asarray(ids) - samples.first_id].astype(np.int64)
        planes = np.empty((len(images), 3, image_size, image_size), np.uint8)
        for image, out in zip(images, planes, strict=True):
            write_planes(image, out)
        return torch.tensor(ids), torch.from_numpy(planes), torch.from_numpy(labels)

    for sample_id, payload in _read_in_order(manifest, split):
        try:
            images.append(centre_crop(decode(payload), image_size))
        except UndecodableError as error:
            shard = manifest.shards.name[samples.shard[sample_id - samples.first_id]]
            bad.append(BadSample(sample_id, shard, str(error)))
            _log.warning("sample %d in %s left out: %s", sample_id, shard, error)
            if len(bad) > max_bad_share * samples.num_samples:
                raise BadSamplesError(
                    f"{len(bad)} of the {samples.num_samples} samples in {split} cannot be decoded, more than the "
                    f"share of {max_bad_share:g} that may be left out:\n{list_of(bad)}"
                ) from error
            continue
        ids.append(sample_id)
        if len(ids) == batch_size:
            yield batch()
            ids, images = [], []
    if ids:
        yield batch()


def read_blocks(
    manifest: Manifest,
    split: str,
    blocks: Sequence[NDArray[np.int64]],
    image_size: int,
    *,
    mirror: MirrorConfig | None = None,
    num_threads: int = 8,
) -> Iterator[tuple[Tensor, Tensor, list[BadSample]]]:
    """Chosen samples: (ids int64 (n,), images uint8 (n, 3, S, S), what cannot be decoded) for each block of ids.

    The ids of a block ascend; images are resized and centre-cropped. Threads read and decode two blocks ahead,
    neighbours in a shard by one request. Raises StorageError where a shard cannot be read or is damaged.
    """
    samples = manifest.split(split)
    fetch = open_fetch(manifest)
    if mirror is not None:
        fetch = MirrorFetch(manifest, fetch, mirror)
    reader = SampleReader(manifest, samples, fetch)

    def read(run: Run, planes: NDArray[np.uint8]) -> list[BadSample]:
        block = reader.read_run(run)
        bad = []
        for row, sample_id in enumerate(block.ids):
            try:
                write_planes(centre_crop(decode(block.payload(row)), image_size), planes[row])
            except UndecodableError as error:
                shard = manifest.shards.name[samples.shard[sample_id - samples.first_id]]
                bad.append(BadSample(sample_id, shard, str(error)))
        return bad

    reading: deque[tuple[NDArray[np.int64], NDArray[np.uint8], list[Future[list[BadSample]]]]] = deque()

    def finished() -> tuple[Tensor, Tensor, list[BadSample]]:
        ids, planes, futures = reading.popleft()
        with Waiting(lambda: f"the images {ids[0]} to {ids[-1]} of {split}"):
            bad = [sample for future in futures for sample in future.result()]
        good = ~np.isin(ids, [sample.sample_id for sample in bad])
        return torch.from_numpy(ids[good]), torch.from_numpy(planes[good]), bad

    with ThreadPoolExecutor(num_threads, thread_name_prefix="parallax-read") as threads:
        try:
            for ids in blocks:
                planes = np.empty((len(ids), 3, image_size, image_size), np.uint8)
                runs = _runs(samples, ids)
                ends = np.cumsum([run.count for run in runs])
                parts = np.split(planes, ends[:-1])
                reading.append((ids, planes, [threads.submit(read, *job) for job in zip(runs, parts, strict=True)]))
                if len(reading) > 2:
                    yield finished()
            while reading:
                yield finished()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _runs(samples: Samples, ids: NDArray[np.int64]) -> list[Run]:
    """Ascending ids as runs of neighbours, each within one shard and one request's bytes."""
    rows = ids - samples.first_id
    request = samples.offset[rows] // _READ_BYTES
    cut = (np.diff(ids) != 1) | (np.diff(samples.shard[rows]) != 0) | (np.diff(request) != 0)
    starts = [0, *(np.flatnonzero(cut) + 1).tolist()]
    return [Run(int(ids[start]), end - start) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _read_in_order(manifest: Manifest, split: str) -> Iterator[tuple[int, memoryview]]:
    samples = manifest.split(split)
    reader = SampleReader(manifest, samples, open_fetch(manifest))
    first = 0
    while first < samples.num_samples:
        same_shard = int(np.searchsorted(samples.shard, samples.shard[first], side="right"))
        near = samples.offset[first:same_shard] < samples.offset[first] + _READ_BYTES
        count = int(np.count_nonzero(near))
        block = reader.read_run(Run(samples.first_id + first, count))
        yield from ((sample_id, block.payload(place)) for place, sample_id in enumerate(block.ids))
        first += count


def centre_crop(image: Pixels, size: int) -> Pixels:
    """(size, size, 3): the central square of the image resized so that its shorter side is 8/7 of ``size``.

    8/7 is ImageNet's 256 to 224; images below 64 px keep their borders, as digits and CIFAR need them. Sizes and places
    are rounded as torchvision's Resize and CenterCrop do: who uses an encoder with these gives it the same pixels.
    Nothing but the square is made: all of a row of 60,000 pixels would be 11 GB.
    """
    shorter, target = min(image.shape[:2]), shorter_side(size)
    height, width = (int(target * side / shorter) for side in image.shape[:2])
    window = (round((height - size) / 2), round((width - size) / 2), size, size)
    return resized_crop(image, 0, 0, image.shape[0], image.shape[1], (height, width), window)


def shorter_side(size: int) -> int:
    """What the shorter side is resized to before ``size`` pixels are cropped from the centre."""
    return size if size < 64 else round(size * 8 / 7)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (N, 3, H, W) -> torch's default dtype, (x / 255 - mean) / std per channel, on the images' device."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device, torch.get_default_dtype())
    return torch.addcmul(shift, images, scale)


@functools.cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """On the device once: a copy from unpinned memory in every step would wait for the step before."""
    with torch.inference_mode(False):  # the first to ask may be an evaluation
        scale = torch.tensor([1 / (255 * s) for s in std], device=device, dtype=dtype)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device, dtype=dtype)
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
