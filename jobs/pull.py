"""Fetch a registered encoder into a folder and say how to load it.

    python -m jobs.pull models:/<name>@<alias> --out <folder> --tracking-uri <uri>

The entry is checked: every file is the one that was registered, nothing is in model.pt2 but tensors and tensor
arithmetic, and the golden embedding comes out.
"""

from pathlib import Path

from pipeline.archive import load_archive
from pipeline.arguments import JobParser
from pipeline.errors import explained
from pipeline.export import check_golden
from pipeline.registry.address import choose_to_read
from pipeline.registry.pull import pull


def main() -> None:
    """Parse the command line, pull, check, print the next step."""
    parser = JobParser(__doc__)
    parser.add_argument("model", help="models:/<name>@<alias> or models:/<name>/<version>")
    parser.add_argument("--out", required=True, type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--tracking-uri",
        help="the MLflow server or sqlite:/// file (default: $MLFLOW_TRACKING_URI, else sqlite:///.parallax/mlflow.db)",
    )
    arguments = parser.read()
    with explained():
        registry = choose_to_read(arguments.tracking_uri)
        print(f"registry {registry.uri} (from {registry.source})")
        pulled = pull(arguments.model, registry.uri, arguments.out)
        check_golden(load_archive(pulled.folder / "data" / "model.pt2"), pulled.folder / "extra_files")
    print(f"""\
{pulled.name} version {pulled.version} is in {pulled.folder}, its golden embedding reproduced
  read  {pulled.folder}/extra_files/README.md: how to load it, with torch alone or timm alone""")


if __name__ == "__main__":
    main()
