"""Embedding real shards on a real Ray, in folders and on S3: the right rows, once, by the encoder that was named."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from jobs import embed as job
from pipeline import storage
from pipeline.archive import load_archive
from pipeline.data.manifest import Manifest
from pipeline.data.writer import Sample, write_shards
from pipeline.export import read_preprocessing
from pipeline.registry.register import register_encoder
from pipeline.registry.tracking import Tracker
from tests.conftest import S3
from tests.encoders import export_tiny, of_another_run, tiny_backbone
from tests.jobs import refusals
from tests.jobs.process import Job
from tests.servers import RayCluster

IMAGES = 120  # 3 shards of 16 and one of 2 to train on, 5 to validate on
BROKEN = 17
REPOSITORY = Path(__file__).parents[2]


class Registry(NamedTuple):
    uri: str
    bundle: Path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two versions of ``tiny`` with the same weights: @old and @champion."""
    folder = tmp_path_factory.mktemp("registry")
    uri, bundle = f"sqlite:///{folder}/mlflow.db", export_tiny(folder / "encoder")
    with Tracker(uri, "embed", "run-1") as tracker:
        for alias, files in (("old", bundle), ("champion", of_another_run(bundle, folder / "2", "run-2"))):
            register_encoder(
                files,
                tracking_uri=uri,
                mlflow_run_id=tracker.mlflow_run_id,
                model_name="tiny",
                alias=alias,
                tags={},
            )
    return Registry(uri, bundle)


def pixels() -> NDArray[np.uint8]:
    """(N, 28, 28, 3) RGB; PNG keeps them exactly, and 28 px need no resizing."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 28, 28, 3), dtype=np.uint8)


def shards_at(url: str, broken: set[int] = frozenset(), per_shard: int = 16) -> Manifest:
    def sample(i: int, image: NDArray[np.uint8]) -> Sample:
        png = b"not an image" if i in broken else cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
        return Sample(f"{i:04d}", png, "png", "train" if i < 50 else "validation")

    return write_shards((sample(i, image) for i, image in enumerate(pixels())), url, max_shard_samples=per_shard)


def embed(registry: Registry, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    options = ["--model", "models:/tiny@champion", "--tracking-uri", registry.uri]
    return subprocess.run(
        [sys.executable, "-m", "jobs.embed", *options, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def refused(monkeypatch: pytest.MonkeyPatch, registry: Registry, model: str, *arguments: str) -> None:
    """The job in this process: it ends with exit code 2 before Ray starts."""
    command = ["jobs.embed", "--model", model, "--tracking-uri", registry.uri, *arguments]
    refusals.refused(monkeypatch, job.main, *command)


def expected(registry: Registry) -> NDArray[np.float32]:
    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return tiny_backbone()(read_preprocessing(registry.bundle)(images)).numpy()


def rows(folder: Path) -> tuple[NDArray[np.int64], NDArray[np.float32], set[tuple[str, int]]]:
    table = pq.read_table(folder).sort_by("sample_id")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    models = set(zip(table["model_name"].to_pylist(), table["model_version"].to_pylist(), strict=True))
    return table["sample_id"].to_numpy(), np.array(table["embedding"].to_pylist(), np.float32), models


@pytest.mark.integration
def test_every_sample_is_embedded_once_and_a_second_run_only_fills_gaps(
    registry: Registry, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """On a Ray of its own, then on a cluster."""
    manifest = shards_at(str(tmp_path / "shards"), {BROKEN})
    out = tmp_path / "out"
    first = embed(registry, "--data", manifest.url, "--out", str(out))
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert "tiny version 2" in first.stdout
    ids, embeddings, models = rows(out)
    assert ids.tolist() == [i for i in range(IMAGES) if i != BROKEN]
    assert "1 of 120 images cannot be decoded" in first.stdout
    np.testing.assert_allclose(embeddings, np.delete(expected(registry), BROKEN, 0), rtol=1e-3, atol=1e-4)
    assert models == {("tiny", 2)}
    names = sorted(path.name for path in out.glob("*.parquet"))
    assert names == sorted(name.replace(".tar", ".parquet") for name in manifest.shards.name)

    lost, empty, kept = out / names[0], out / names[2], out / names[BROKEN // 16]
    contents, written = [lost.read_bytes(), empty.read_bytes()], kept.stat().st_mtime_ns
    lost.unlink()
    empty.write_bytes(b"")
    again = embed(registry, "--data", manifest.url, "--out", str(out), env=ray_cluster.env)
    assert again.returncode == 0, again.stderr
    assert f"not whole, so not taken for done: {empty.name}" in again.stdout
    assert f"{len(names) - 2} of {len(names)} shards" in again.stdout
    assert "1 of 120 images cannot be decoded" in again.stdout  # by the first attempt
    assert [lost.read_bytes(), empty.read_bytes()] == contents
    assert kept.stat().st_mtime_ns == written


@pytest.mark.integration
def test_from_s3_to_s3_on_a_running_cluster_one_split(
    registry: Registry, s3: S3, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    manifest = shards_at(f"{s3.url}/shards")
    options = ("--data", manifest.url, "--out", f"{s3.url}/out", "--split", "validation")
    done = embed(registry, *options, env=ray_cluster.env)
    assert done.returncode == 0, done.stderr
    for name in storage.list_sizes(f"{s3.url}/out"):
        storage.download(f"{s3.url}/out/{name}", tmp_path / name)
    ids, embeddings, _ = rows(tmp_path)
    assert ids.tolist() == list(range(50, IMAGES))
    np.testing.assert_allclose(embeddings, expected(registry)[50:], rtol=1e-3, atol=1e-4)


@pytest.mark.integration
def test_a_killed_actor_is_made_up_for(registry: Registry, tmp_path: Path) -> None:
    """There is one, on its second shard of 120 or soon after: what it had in work is done again by its successor."""
    manifest = shards_at(str(tmp_path / "shards"), per_shard=1)
    out = tmp_path / "out"
    options = ["--model", "models:/tiny@champion", "--tracking-uri", registry.uri, "--actors", "1"]
    job = Job("embed", *options, "--data", manifest.url, "--out", str(out))
    job.read_until("1 of 120 shards")
    (actor,) = job.pids(b"ray::_ShardEmbedder")
    os.kill(actor, signal.SIGKILL)
    assert len(list(out.glob("*.parquet"))) < IMAGES
    assert "120 of 120 shards" in job.finish()
    ids, embeddings, _ = rows(out)
    assert ids.tolist() == list(range(IMAGES))
    np.testing.assert_allclose(embeddings, expected(registry), rtol=1e-3, atol=1e-4)


@pytest.mark.integration
def test_a_damaged_shard_is_one_clear_error(registry: Registry, ray_cluster: RayCluster, tmp_path: Path) -> None:
    manifest = shards_at(str(tmp_path / "shards"))
    shard = tmp_path / "shards" / manifest.shards.name[0]
    data = bytearray(shard.read_bytes())
    offset, length = manifest.samples.offset[0], manifest.samples.length[0]
    data[offset : offset + length] = bytes(length)
    shard.write_bytes(data)
    done = embed(registry, "--data", manifest.url, "--out", str(tmp_path / "out"), env=ray_cluster.env)
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / shard.name.replace(".tar", ".parquet")).exists()


@pytest.mark.heavy
def test_too_many_images_that_cannot_be_decoded_end_the_job(registry: Registry, tmp_path: Path) -> None:
    """The second attempt too, although it finds nothing left to decode: the files say what they lack."""
    manifest = shards_at(str(tmp_path / "shards"), {17, 18})
    for _ in range(2):
        done = embed(registry, "--data", manifest.url, "--out", str(tmp_path / "out"))
        assert done.returncode == 2
        assert "2 of 120 images cannot be decoded" in done.stderr
        assert manifest.shards.name[1] in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "models:/tiny@best"}, "aliases of tiny: @champion (version 2), @old (version 1)"),
        ({"--split": "test"}, "has the splits train, validation"),
        ({"--data": "nowhere"}, "nowhere holds no manifest.json"),
        ({"--gpus-per-actor": "-1"}, "'-1' is neither a whole number nor a share of one GPU"),
        ({"--gpus-per-actor": "nan"}, "'nan' is neither a whole number nor a share of one GPU"),
        ({"--gpus-per-actor": "1.5"}, "'1.5' is neither a whole number nor a share of one GPU"),
        ({"--actors": "0"}, "'0' is not a whole number from 1 on"),
    ],
)
def test_what_is_wrong_is_said_before_ray_starts(
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    message: str,
) -> None:
    manifest = shards_at(str(tmp_path / "shards"))
    options = {"--data": manifest.url, "--out": str(tmp_path / "out"), **change}
    model = options.pop("model", "models:/tiny@champion")
    refused(monkeypatch, registry, model, *(text for option in options.items() for text in option))
    error = capsys.readouterr().err
    assert message in error
    assert "ray" not in error.lower().replace(str(tmp_path), "")


def test_an_encoder_that_was_swapped_in_the_store_is_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that fit each other, but not the golden embedding: card.json's checksums are forged to match."""
    forged = of_another_run(registry.bundle, tmp_path / "forged", "run-3")
    other = export_tiny(tmp_path / "other", tiny_backbone(seed=1))
    card = json.loads((forged / "card.json").read_text())
    card["files"]["model.pt2"] = json.loads((other / "card.json").read_text())["files"]["model.pt2"]
    (forged / "model.pt2").write_bytes((other / "model.pt2").read_bytes())
    (forged / "card.json").write_text(json.dumps(card))
    assert load_archive(forged / "model.pt2")
    with Tracker(registry.uri, "embed", "run-1") as tracker:
        register_encoder(
            forged,
            tracking_uri=registry.uri,
            mlflow_run_id=tracker.mlflow_run_id,
            model_name="forged",
            alias="champion",
            tags={},
        )
    manifest = shards_at(str(tmp_path / "shards"))
    refused(monkeypatch, registry, "models:/forged@champion", "--data", manifest.url, "--out", str(tmp_path / "out"))
    assert "does not reproduce its golden embedding" in capsys.readouterr().err
