"""Make a manifest for shards that other tools wrote (webdataset, img2dataset): one walk, nothing is rewritten.
Run again after an interruption, it goes on where it stopped.

python -m jobs.index s3://bucket/laion
"""

import sys

from tqdm import tqdm

from pipeline.arguments import JobParser, positive
from pipeline.data.foreign import index_shards
from pipeline.errors import explained


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 with the reason on stderr."""
    parser = JobParser(__doc__, prog="python -m jobs.index")
    parser.add_argument("url", help="the folder of the tars, at any depth; the manifest is written there")
    parser.add_argument("--threads", type=positive, default=8, help="shards walked at the same time")
    options = parser.read(arguments)
    with explained(), tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        indexed = index_shards(options.url, num_threads=options.threads, on_progress=show)
    manifest = indexed.manifest
    counts = ", ".join(f"{name} {manifest.split(name).num_samples:,}" for name in manifest.splits)
    print(f"{len(manifest.shards.name)} shards, {counts}: {manifest.url}\ndigest {manifest.digest}")
    if indexed.without_image:
        print(f"{indexed.without_image:,} samples without an image were passed over")
    if indexed.bad_labels:
        print(
            f"{indexed.bad_labels:,} samples have no label: what is there is not the number of a class, e.g. "
            f"{indexed.bad_label}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
