"""Look at what a config's views do: a grid as PNG, one row per image, the resized original and then its views.

python -m jobs.preview configs/quickstart.yaml views.png --rows 8
"""

import sys
from pathlib import Path

from pipeline.arguments import JobParser, positive
from pipeline.config import load_config
from pipeline.data.preview import view_grid
from pipeline.errors import UserError, explained
from pipeline.preflight import prepare_shards


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with the reason on stderr."""
    parser = JobParser(__doc__, prog="python -m jobs.preview")
    parser.add_argument("config", help="a pretraining config, e.g. configs/quickstart.yaml")
    parser.add_argument("png", type=Path, help="the file to write")
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="train.epochs=5, or configs/models/<name>.yaml"
    )
    parser.add_argument("--rows", type=positive, default=8, help="images")
    options = parser.read(arguments)
    with explained():
        config = load_config(options.config, options.overrides)
        manifest = prepare_shards(config)
        png = view_grid(manifest, config.method.views, config.model.image_size, config.seed, options.rows)
        try:
            options.png.write_bytes(png)
        except OSError as error:
            raise UserError(f"cannot write {options.png}: {error.strerror}; is there such a folder?") from error
    print(f"{options.png}: {options.rows} images of {manifest.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
