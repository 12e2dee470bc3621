"""Embed shards with a registered encoder: Parquet with sample id, embedding, model name and version.

    python -m jobs.embed --model models:/<name>@champion --data <shards url> --out <url> --tracking-uri <uri>

The alias is resolved once, here; every row names the version. Running the same command again embeds what is missing:
the folder says which files of which registry's encoder, and which shards, its embeddings were made from.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from pipeline import storage
from pipeline.archive import load_archive
from pipeline.arguments import JobParser, positive
from pipeline.config import ClusterConfig
from pipeline.data.manifest import Manifest
from pipeline.embeddings import Origin, claim, held
from pipeline.errors import UserError, explained
from pipeline.export import check_golden
from pipeline.registry.address import choose_to_read
from pipeline.registry.pull import pull


def main() -> None:
    """Parse the command line, check everything before Ray starts, embed, say where the files are."""
    parser = JobParser(__doc__)
    parser.add_argument("--model", required=True, help="models:/<name>@<alias> or models:/<name>/<version>")
    parser.add_argument("--data", required=True, help="the folder of shards that holds manifest.json, any fsspec URL")
    parser.add_argument("--out", required=True, help="the folder for the Parquet files, any fsspec URL")
    parser.add_argument(
        "--tracking-uri",
        help="the MLflow server or sqlite:/// file (default: $MLFLOW_TRACKING_URI, else sqlite:///.parallax/mlflow.db)",
    )
    parser.add_argument("--split", action="append", help="one of the manifest's splits; repeatable (default: all)")
    parser.add_argument("--batch-size", type=positive, default=256, help="images per forward pass (default: 256)")
    parser.add_argument("--actors", type=positive, default=2, help="at most so many encoders at once (default: 2)")
    parser.add_argument("--gpus-per-actor", type=_share, default=0, help="e.g. 1, or 0.5 to share one (default: 0)")
    parser.add_argument("--address", help="a running Ray cluster (default: $RAY_ADDRESS, else a Ray of our own)")
    arguments = parser.read()
    with explained():
        embed(arguments)


def embed(arguments: argparse.Namespace) -> None:
    """Driver: resolve, fetch and verify the encoder, probe the output, run the actors."""
    out_url = storage.resolve(arguments.out)
    manifest = Manifest.load(arguments.data)
    splits = tuple(arguments.split or manifest.splits)
    if unknown := [split for split in splits if split not in manifest.splits]:
        raise UserError(f"--split {unknown[0]}: {manifest.url} has the splits {', '.join(manifest.splits)}")
    manifest.verify_present()
    storage.probe_writable(out_url)
    cluster = ClusterConfig(
        address=arguments.address, num_workers=arguments.actors, gpus_per_worker=arguments.gpus_per_actor
    )

    with TemporaryDirectory(prefix="parallax-pull-") as folder:
        registry = choose_to_read(arguments.tracking_uri)
        print(f"registry {registry.uri} (from {registry.source})")
        pulled = pull(arguments.model, registry.uri, Path(folder) / "entry")
        check_golden(load_archive(pulled.folder / "data" / "model.pt2"), pulled.folder / "extra_files")

        origin = Origin(
            model_name=pulled.name,
            model_version=pulled.version,
            encoder_digest=pulled.digest,
            registry_uri=pulled.registry_uri,
            data_digest=manifest.digest,
        )
        claim(out_url, origin, manifest.url)
        earlier = held(out_url, origin, manifest)

        from pipeline.cluster.connection import connected  # Ray takes 3 s to import; a mistake should not cost them
        from pipeline.cluster.embed import Embedded, embed_shards, read_encoder

        encoder = read_encoder(pulled.folder)
    print(f"{arguments.model} is {pulled.name} version {pulled.version}; its golden embedding is reproduced")
    if earlier.damaged:
        print(f"  not whole, so not taken for done: {', '.join(earlier.damaged)}")

    def show(done: Embedded) -> None:
        rate = f", {done.images / done.seconds:,.0f} images/s" if done.seconds else ""
        print(f"  {done.shards} of {done.of_shards} shards, {done.images:,} images{rate}", flush=True)

    with connected(cluster, {"--data": manifest.url, "--out": out_url}):
        done = embed_shards(
            encoder,
            manifest,
            origin,
            out_url,
            splits=splits,
            done=earlier.undecodable,
            batch_size=arguments.batch_size,
            max_actors=arguments.actors,
            cpus_per_actor=cluster.cpus_per_worker,
            gpus_per_actor=cluster.gpus_per_worker,
            on_progress=show,
        )
    if done.undecodable:
        total = sum(manifest.split(split).num_samples for split in splits)
        print(f"  {done.undecodable:,} of {total:,} images cannot be decoded and have no embedding")
    print(f"""\
{done.shards} shards are embedded by {pulled.name} version {pulled.version}
  files  {out_url}/*.parquet
  read   pyarrow.parquet.read_table({out_url!r}): sample_id, embedding, model_name, model_version""")


def _share(text: str) -> float:
    try:
        return ClusterConfig.model_validate({"gpus_per_worker": text}).gpus_per_worker
    except ValidationError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number nor a share of one GPU; e.g. 0, 0.5 or 1"
        ) from error


if __name__ == "__main__":
    main()
