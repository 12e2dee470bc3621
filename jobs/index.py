"""Make a manifest for shards that other tools wrote (webdataset, img2dataset): one walk, nothing is rewritten.
Run again after an interruption, it goes on where it stopped.

python -m jobs.index s3://bucket/laion
python -m jobs.index ./shards --split '*-dev-*=validation' --skip-damaged
"""

import argparse
import re
import sys
from collections import Counter

from tqdm import tqdm

from pipeline.arguments import JobParser, positive
from pipeline.data.foreign import MAX_PASSED_OVER, Indexed, find_shards, index_shards, listed
from pipeline.data.splits import SPLIT_NAME, split_of
from pipeline.errors import explained


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with the reason on stderr."""
    parser = JobParser(__doc__, prog="python -m jobs.index")
    parser.add_argument("url", help="the folder of the tars, at any depth; the manifest is written there")
    parser.add_argument(
        "--split", action="append", type=_split, metavar="[GLOB=]NAME", default=[],
        help="the split of all shards, or of those whose name below the folder matches; the last that matches counts",
    )  # fmt: skip
    parser.add_argument("--skip-damaged", action="store_true", help="index the other shards, and say which these are")
    parser.add_argument(
        "--max-passed-over", type=_share, metavar="SHARE", default=MAX_PASSED_OVER,
        help=f"of what may be images; more is an error (default {MAX_PASSED_OVER:g})",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, default=8, help="shards walked at the same time")
    options = parser.read(arguments)
    with explained():
        found = find_shards(options.url, options.split)
        shards = ", ".join(f"{split} {count:,}" for split, count in Counter(found.splits.values()).items())
        print(f"shards by split: {shards}", flush=True)
        with tqdm(unit="B", unit_scale=True, disable=None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            indexed = index_shards(
                found,
                num_threads=options.threads,
                skip_damaged=options.skip_damaged,
                max_passed_over=options.max_passed_over,
                on_progress=show,
            )
    _report(indexed)
    return 0


def _report(indexed: Indexed) -> None:
    manifest = indexed.manifest
    counts = ", ".join(f"{name} {manifest.split(name).num_samples:,}" for name in manifest.splits)
    print(f"{len(manifest.shards.name):,} shards, {counts}: {manifest.url}")
    labelled, names = int((manifest.samples.label >= 0).sum()), manifest.class_names
    shown = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    print(f"{len(names):,} classes{shown}, {labelled:,} labels")
    print(f"digest {manifest.digest}")
    if manifest.passed_over:
        print(f"passed over: {listed(manifest.passed_over, indexed.examples)}")
    for error in indexed.damaged:
        print(f"skipped: {error}")


def _split(text: str) -> tuple[str, str]:
    pattern, _, name = text.rpartition("=")
    split = split_of(name) or name
    if not re.fullmatch(SPLIT_NAME, split):
        raise argparse.ArgumentTypeError(
            f"{name!r} is no name of a split, which has small letters, digits and '_' and begins with a letter; e.g. "
            "validation, or 'val/*=validation'"
        )
    return pattern or "*", split


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; it lies between 0 and 1, e.g. 0.2")
    return share


if __name__ == "__main__":
    sys.exit(main())
