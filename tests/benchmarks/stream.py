"""From S3 to finished views, against curl, webdataset + torchvision and LitData, on the same bytes in one run.

    python -m tests.benchmarks.stream [--quick]

Needs the extra `benchmarks` and 10 GB of disk. A SeaweedFS server on loopback holds JPEGs of 29 kB, 500 x 375. Peers
are interleaved, ratios are medians over the rounds, above 1 is better than a peer; CPU seconds are this process's
with all its threads (one decodes and augments), without the server's. The last line is one JSON object:

stream_vs_curl           bytes per wall second, checked by crc32, / curl keep-alive to /dev/null
cpu_s_per_gb             CPU seconds per GB so read (target: at most 0.4); curl's and fetch's are beside it: byte ranges
                         of a block's length by the reader's own sockets and threads, neither sliced nor checked
first_batch_late_vs_0    wall seconds to a first batch of 64 at step 10,000 / at step 0, same set (asked: at most 1.5)
first_1024_late_vs_0     the same for a batch of 1,024
plan_100m_s              seconds to plan 100 million samples in 100,000 shards and hand out a first batch of 4,096
views_vs_webdataset_pil  images per CPU second from S3 to two 224-px SimCLR views / webdataset + s3fs + torchvision's
                         PIL transforms with PIL's blur, the fastest usual stack
views_vs_torchvision     the same / with torchvision's own GaussianBlur
epoch2_vs_litdata        samples per CPU second, bytes only, second epoch: local mirror / LitData's warm cache
data_wait_share          of a ResNet-18 training at 224 px on the machine's cores, one loader worker
scaling_1_to_2           views per wall second of two loader workers / of one
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import litdata
import numpy as np
import s3fs
import torch
import torchvision
import webdataset
from PIL import Image, ImageFilter
from torchvision import transforms

from pipeline import storage
from pipeline.data.assemble import Assembler, Rows
from pipeline.data.fetch import Fetch, open_fetch
from pipeline.data.loader import Loader, normalize
from pipeline.data.manifest import Manifest, Shards
from pipeline.data.mirror import MirrorConfig, MirrorFetch
from pipeline.data.plan import BLOCK_BYTES, MAX_LANES, Plan
from pipeline.data.reader import FETCH_THREADS, LaneReader
from pipeline.data.views import RECIPES, View
from pipeline.data.writer import Sample, write_shards
from tests.data.images import jpeg, photo
from tests.servers import S3Server

BATCH = 64
DISTINCT = 128  # photos; drawing one takes longer than augmenting it


def make_samples(count: int) -> Iterator[Sample]:
    images = [jpeg(photo(375, 500, seed), quality=85) for seed in range(DISTINCT)]
    for i in range(count):
        # A comment at the end makes every file different; decoders stop before it.
        yield Sample(f"{i:07d}", images[i % DISTINCT] + b"%07d" % i, "jpg", "train", label=i % 10)


def cpu_s(work: Callable[[], None]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_s(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Epochs:
    """One epoch after the other in training order, every sample checked and handed out, by one reader."""

    def __init__(self, manifest: Manifest, fetch: Fetch) -> None:
        samples = manifest.split("train")
        self._plan = Plan(manifest.shards, "train", BATCH, seed=0)
        self._reader = LaneReader(manifest, samples, self._plan, fetch, range(BATCH))
        self._step = 0

    def __call__(self) -> None:
        """The next epoch, reading ahead no further than its end: a peer measured next has the machine to itself."""
        plan = self._plan
        end = self._step + plan.steps_per_epoch
        handed_out = 0
        for _ in range(plan.steps_per_epoch):
            local = self._step % plan.steps_per_epoch
            for block in self._reader.at(self._step, end).values():
                first = local * plan.batch_per_lane - block.start
                for place in range(first, first + plan.batch_per_lane):
                    handed_out += len(block.payload(place)) > 0
            self._step += 1
        assert handed_out == plan.steps_per_epoch * BATCH


def curl_all(manifest: Manifest) -> None:
    config = "".join(
        f'url = "{storage.sign(manifest.shard_url(shard))}"\noutput = "/dev/null"\n'
        for shard in range(len(manifest.shards.name))
    )
    subprocess.run(["curl", "-sf", "-K", "-"], input=config.encode(), check=True)


class Ranges:
    """All bytes into memory, and nothing more: as many buffers as lanes, so they are as cold as a block's."""

    def __init__(self, manifest: Manifest) -> None:
        self._fetch = open_fetch(manifest)
        sizes = manifest.shards.size.tolist()
        self._ranges = [
            (shard, start, min(start + BLOCK_BYTES, size))
            for shard, size in enumerate(sizes)
            for start in range(0, size, BLOCK_BYTES)
        ]
        self._buffers = [np.ones(BLOCK_BYTES, np.uint8).data for _ in self._ranges[:MAX_LANES]]
        self._threads = ThreadPoolExecutor(FETCH_THREADS)

    def __call__(self) -> None:
        for _ in self._threads.map(self._fill, self._ranges):
            pass

    def _fill(self, piece: tuple[int, int, int]) -> None:
        shard, start, end = piece
        buffer = self._buffers.pop(0)
        self._fetch.fill(shard, start, buffer[: end - start])
        self._buffers.append(buffer)


def stream(manifest: Manifest, rounds: int) -> dict[str, float]:
    total = int(manifest.shards.size.sum())
    epoch, ranges = Epochs(manifest, open_fetch(manifest)), Ranges(manifest)
    ours, curl, cpu, curl_cpu, fetch_cpu = [], [], [], [], []
    for turn in range(-2, rounds):
        started = time.process_time()
        own = wall_s(epoch)
        own_cpu = time.process_time() - started
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        theirs = wall_s(lambda: curl_all(manifest))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        bare_cpu = cpu_s(ranges)
        if turn >= 0:  # the first two fill the server's caches, and the buffers to their longest block
            ours.append(own)
            curl.append(theirs)
            cpu.append(own_cpu / total * 1e9)
            fetch_cpu.append(bare_cpu / total * 1e9)
            curl_cpu.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / total * 1e9)
    say(f"read    {total / statistics.median(ours) / 1e6:5.0f} MB/s, {statistics.median(cpu):.2f} CPU-s/GB")
    say(f"curl    {total / statistics.median(curl) / 1e6:5.0f} MB/s, {statistics.median(curl_cpu):.2f} CPU-s/GB")
    say(f"fetch   {statistics.median(fetch_cpu):.2f} CPU-s/GB without samples and checksums")
    return {
        "stream_vs_curl": statistics.median(theirs / own for theirs, own in zip(curl, ours, strict=True)),
        "cpu_s_per_gb": statistics.median(cpu),
        "curl_cpu_s_per_gb": statistics.median(curl_cpu),
        "fetch_cpu_s_per_gb": statistics.median(fetch_cpu),
    }


class Views:
    """Two views of whole batches, made in this process as a loader worker does."""

    def __init__(self, manifest: Manifest, batch: int) -> None:
        self._assembler = Assembler(manifest, Rows("train", RECIPES["simclr"], 224, batch, 0, 0, batch))
        self._views = [np.empty((batch, 3, 224, 224), np.uint8) for _ in range(2)]
        self._ids = np.empty(batch, np.int64)

    def fill(self, step: int, end_step: int) -> None:
        self._assembler.fill(step, end_step, self._views, self._ids)

    def close(self) -> None:
        self._assembler.close()


def first_batch(manifest: Manifest, rounds: int, batch: int) -> tuple[float, float]:
    """Seconds to the first batch of a run that goes on after it, at step 0, and what a late one takes of that."""

    def wait(step: int) -> float:
        started = time.perf_counter()
        views = Views(manifest, batch)
        views.fill(step, step + 10_000)
        seconds = time.perf_counter() - started
        views.close()
        time.sleep(1)  # its threads end with the blocks that they had begun
        return seconds

    waited: dict[int, list[float]] = {0: [], 10_000: []}
    wait(0)  # compiles
    for _ in range(rounds):
        for step, collected in waited.items():
            collected.append(wait(step))
    start, late = waited.values()
    say(
        f"first batch of {batch} after {statistics.median(start):.2f} s at step 0, "
        f"{statistics.median(late):.2f} s at step 10,000"
    )
    return statistics.median(start), statistics.median(b / a for a, b in zip(start, late, strict=True))


class PilBlur:
    """MoCo's and DINO's: PIL's approximation by box filters, 10x torchvision's speed."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def torchvision_views(blur: object) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.PILToTensor(),
        ]
    )


def usual_stack(manifest: Manifest, blur: object, count: int) -> None:
    """webdataset over s3fs, PIL, torchvision v1."""
    fs = s3fs.S3FileSystem()
    webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize: fs.open(url, mode)
    transform = torchvision_views(blur)
    urls = [manifest.shard_url(shard) for shard in range(len(manifest.shards.name))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg")
    for index, (image,) in enumerate(dataset):
        _ = transform(image), transform(image)
        if index + 1 == count:
            return


def our_stack(manifest: Manifest, count: int) -> None:
    """A whole epoch of a set of ``count``: it reads ahead, and what it read is then used."""
    views = Views(manifest, BATCH)
    for step in range(count // BATCH):
        views.fill(step, count // BATCH)
    views.close()


def plan_100m(rounds: int) -> dict[str, float]:
    shards, each = 100_000, np.full(100_000, 1000)
    table = Shards(tuple(f"{i}.tar" for i in range(shards)), ("train",) * shards, each * 35_000, each)
    times = [wall_s(lambda seed=seed: Plan(table, "train", 4096, seed).batch(0, 0)) for seed in range(rounds)]
    say(f"100 million samples are planned in {statistics.median(times):.2f} s")
    return {"plan_100m_s": statistics.median(times)}


def views(manifest: Manifest, rounds: int, count: int, peer_count: int) -> dict[str, float]:
    ours, pil, own_blur = [], [], []
    peers = [(pil, PilBlur()), (own_blur, transforms.GaussianBlur(23, (0.1, 2.0)))]
    for turn in range(rounds + 1):
        rate = count / cpu_s(lambda: our_stack(manifest, count))
        rates = [peer_count / cpu_s(lambda b=blur: usual_stack(manifest, b, peer_count)) for _, blur in peers]
        if turn:
            ours.append(rate)
            for (collected, _), peer_rate in zip(peers, rates, strict=True):
                collected.append(peer_rate)
    for name, collected in (("parallax", ours), ("webdataset + PIL blur", pil), ("webdataset + torchvision", own_blur)):
        say(f"{name:26}{statistics.median(collected):6.0f} images per CPU-second, two views each")
    return {
        "images_per_cpu_s": statistics.median(ours),
        "views_vs_webdataset_pil": statistics.median(a / b for a, b in zip(ours, pil, strict=True)),
        "views_vs_torchvision": statistics.median(a / b for a, b in zip(ours, own_blur, strict=True)),
    }


def epoch_two(manifest: Manifest, folder: Path, rounds: int) -> dict[str, float]:
    mirror = MirrorFetch(manifest, open_fetch(manifest), MirrorConfig(folder=str(folder / "mirror")))
    epoch = Epochs(manifest, mirror)
    epoch()
    count = manifest.split("train").num_samples // BATCH * BATCH
    chunks = folder / "litdata"
    with open(os.devnull, "w") as null, redirected(null):
        litdata.optimize(
            fn=identity,
            inputs=[sample.image for sample in make_samples(manifest.split("train").num_samples)],
            output_dir=str(chunks),
            chunk_bytes="64MB",
            num_workers=1,
        )
        dataset = litdata.StreamingDataset(str(chunks), shuffle=True)

    def theirs() -> None:
        for data in dataset:
            assert len(data) > 1000

    theirs()  # its first epoch
    ours, lit = [], []
    for _ in range(rounds):
        ours.append(cpu_s(epoch) / count)
        lit.append(cpu_s(theirs) / len(dataset))
    say(f"epoch 2: {statistics.median(ours) * 1e6:.0f} us/sample from the mirror, crc32 checked")
    say(f"epoch 2: {statistics.median(lit) * 1e6:.0f} us/sample from LitData's chunks")
    gigabytes = int(manifest.shards.size.sum()) / 1e9
    return {
        "epoch2_vs_litdata": statistics.median(b / a for a, b in zip(ours, lit, strict=True)),
        "cpu_s_per_gb_cached": statistics.median(ours) * count / gigabytes,
    }


def identity(data: bytes) -> bytes:
    return data


class redirected:  # noqa: N801  a context manager
    """Standard output and error of this process and its children, while LitData talks."""

    def __init__(self, file: object) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._saved = [os.dup(1), os.dup(2)]
        for fd in (1, 2):
            os.dup2(self._file.fileno(), fd)  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for fd, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, fd)
            os.close(saved)


def data_wait(manifest: Manifest, steps: int) -> dict[str, float]:
    """A real training step on all cores beside one loader worker."""
    model = torchvision.models.resnet18(num_classes=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = Loader(manifest, "train", RECIPES["simclr"], image_size=224, global_batch_size=32, seed=0, num_workers=1)
    waited, worked = 0.0, 0.0
    started = time.perf_counter()
    for step, batch in enumerate(loader.batches(0, steps + 1)):
        arrived = time.perf_counter()
        if step:  # the first waits for the worker to start
            waited += arrived - started
        for view in batch.views:
            x = normalize(view, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        started = time.perf_counter()
        if step:
            worked += started - arrived
    share = waited / (waited + worked)
    say(f"training waits for data {share:.2%} of {worked / steps:.1f} s a step")
    return {"data_wait_share": share}


def scaling(manifest: Manifest, batches: int) -> dict[str, float]:
    def rate(num_workers: int) -> float:
        loader = Loader(
            manifest, "train", (View(count=2),), image_size=224, global_batch_size=BATCH, seed=0,
            num_workers=num_workers,
        )  # fmt: skip
        iterator = loader.batches(0, batches + 4)
        for _ in range(4):  # workers start, slots fill
            next(iterator)
        seconds = wall_s(lambda: [None for _ in iterator] and None)
        return batches * BATCH * 2 / seconds

    one, two = rate(1), rate(2)
    say(f"loader: {one:.0f} views/s with one worker, {two:.0f} with two")
    return {"views_per_s_1": one, "views_per_s_2": two, "scaling_1_to_2": two / one}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    quick = parser.parse_args().quick
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not outlive this process
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="parallax-stream-") as name:
        folder = Path(name)
        server = S3Server(folder)
        try:
            os.environ.update(server.env)
            count = 2048 if quick else 300_000  # 9 GB: a lane of the plan holds several blocks, as in real sets
            manifest = write_shards(make_samples(count), f"{server.new_bucket()}/shards", max_shard_bytes=128 * 2**20)
            say(f"{count} images, {int(manifest.shards.size.sum()) / 1e6:.0f} MB, {len(manifest.shards.name)} shards")
            rounds = 3 if quick else 5
            figures |= stream(manifest, rounds)
            figures["first_batch_s"], figures["first_batch_late_vs_0"] = first_batch(manifest, rounds, BATCH)
            figures["first_1024_s"], figures["first_1024_late_vs_0"] = first_batch(manifest, rounds, 1024)
            figures |= plan_100m(rounds)
            small = 512 if quick else 2048
            few = write_shards(make_samples(small), f"{server.new_bucket()}/shards")
            figures |= views(few, 1 if quick else 3, small, 48 if quick else 96)
            smaller = write_shards(make_samples(min(count, 16_000)), f"{server.new_bucket()}/shards")
            figures |= epoch_two(smaller, folder, rounds)
            torch.set_num_threads(os.cpu_count() or 1)
            figures |= data_wait(manifest, 2 if quick else 8)
            figures |= scaling(manifest, 6 if quick else 40)
        finally:
            server.stop()
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
