"""Secrets: refused where they would be saved or shown, used from the environment, and found in nothing that is written.

Every kind is planted in a config's file, an override, ``cluster.env``, a command line, and the environment of a run.
"""

import base64
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs import embed, index, pretrain, preview, pull, queue, rayjob, sweep, write_shards
from pipeline.cluster.kuberay import ray_job
from pipeline.config import ClusterConfig, Config, ConfigError, load_config
from pipeline.errors import UserError
from pipeline.model_card import ModelCard
from pipeline.registry.address import choose
from pipeline.registry.tracking import Tracker
from pipeline.secrets import HIDDEN, is_secret_name, objections, redacted, secret_in, without_secrets
from pipeline.sweep.config import load_sweep
from pipeline.sweep.space import SweepError
from tests.jobs.refusals import refused
from tests.servers import MLflowServer
from tests.strangers.digits import SMALL, few_digits

QUICKSTART = "configs/quickstart.yaml"
PLANTED = "Hunter2andMore"  # part of every secret below
BY_VALUE = {
    "password in a URL": f"http://me:{PLANTED}@mlflow:5000",
    "token in a URL": f"https://{PLANTED}@mlflow",
    "password with a slash": f"http://me:pa/{PLANTED}@mlflow:5000",
    "password of a database": f"postgresql+psycopg://me:{PLANTED}@db/mlflow",
    "password within": f"table:https://me:{PLANTED}@host/labels.csv",
    "AWS signature": f"https://b.s3.amazonaws.com/k?X-Amz-Expires=60&X-Amz-Signature={PLANTED}",
    "Azure SAS": f"https://a.blob.core.windows.net/c?sv=2024&sig={PLANTED}",
    "access token": f"https://host/shards?access_token={PLANTED}",
    "AWS access key": f"AKIA{PLANTED.upper()}0O",
    "private key": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{PLANTED}\n-----END OPENSSH PRIVATE KEY-----",
    "JSON web token": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{PLANTED}.c2ln",
    "GitHub token": f"ghp_{PLANTED}0123456789",
    "Hugging Face token": f"hf_{PLANTED}0123456789",
    "Slack token": f"xoxb-1234-{PLANTED}",
    "API key": f"sk-proj-{PLANTED}0123456789",
    "connection string": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={PLANTED}==",
    "bearer token": f"Authorization: Bearer {PLANTED}",
    "password without a scheme": f"me:{PLANTED}@proxy:3128",
    "webhook": f"https://discord.com/api/webhooks/1/{PLANTED}",
}
BY_NAME = [
    "AZURE_STORAGE_KEY", "DB_PASSWD", "GH_PAT", "MYSQL_PWD", "PGPASSWORD", "SAS", "AZURE_STORAGE_CONNECTION_STRING",
    "HF_TOKEN", "DB_PW", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "clientSecret", "SMTP_PASS", "SSH_PRIVATE_KEY",
    "BASIC_AUTH",
]  # fmt: skip
STRINGS = (
    "storage.url", "data.shards", "data.source", "tracking.uri", "tracking.experiment", "method.name",
    "model.name", "model.args.x", "registry.model_name", "cluster.address", "cluster.env.HTTPS_PROXY",
)  # fmt: skip
HARMLESS = [
    "s3://bucket/key@2/x", "s3://bucket/run #3?x", "http://127.0.0.1:9000/b/k@v2", "http://[::1]:5000/x@y", "",
    "abfss://container@account.dfs.core.windows.net/x", "sftp://me@host/x", "sqlite:////a/b:c@d/x.db", "/etc/passwd",
    "zip://a.csv::s3://b/c@d", "folder:/data/token=5/x", "torchvision:CIFAR10:/data", "ray://head:10001", "auto",
    "d41d8cd98f00b204e9800998ecf8427e", "quickstart-0123456789", "vit_small_patch16_224.augreg_in21k", "token",
    "/home/me/sk-learn-digits-dataset-of-2026-v2", "task-resnet50-pretraining-large-256", "http://proxy:3128",
    "basic authentication-module", "models:/parallax-encoder@champion", "a@b.c", "user:password", "3.5",
    "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/x@y", "vit class_token=cls", "jane.doe@uni.edu: first try",
    "registry:5000/parallax@sha256:" + 32 * "0f", "me/parallax:test@sha256:" + 32 * "0f", "http://h:5000/p:q@r:80",
]  # fmt: skip


def flat_yaml(key: str, value: str) -> dict[str, object]:
    first, *rest = key.split(".")
    nested: object = value
    for part in reversed(rest):
        nested = {part: nested}
    return {first: nested}


@pytest.mark.parametrize("secret", BY_VALUE.values(), ids=BY_VALUE)
def test_a_secret_is_refused_by_its_value_under_any_key(tmp_path: Path, secret: str) -> None:
    file = tmp_path / "more.yaml"
    for key in STRINGS:
        file.write_text(yaml.safe_dump(flat_yaml(key, secret)))
        for given in (f"{key}={yaml.safe_dump(secret, default_style=chr(34))}", str(file)):
            with pytest.raises(ConfigError) as caught:
                load_config(QUICKSTART, [given])
            assert f"{key} holds a" in str(caught.value)
            assert "environment" in str(caught.value)
            assert PLANTED.lower() not in str(caught.value).lower()


@pytest.mark.parametrize("name", BY_NAME)
def test_a_secret_is_refused_by_its_name(name: str) -> None:
    for value in (PLANTED, "'1234567'", "1234567"):  # a number where text is wanted was quoted by the type's error
        with pytest.raises(ConfigError) as caught:
            load_config(QUICKSTART, [f"cluster.env.{name}={value}"])
        assert f"cluster.env.{name} is a secret by its name: Ray shows cluster.env" in str(caught.value)
        assert "secretKeyRef" in str(caught.value)
        assert value.strip("'") not in str(caught.value)
    with pytest.raises(ValueError, match="is a secret by its name") as raised:
        ClusterConfig(env={name: PLANTED})
    assert PLANTED not in str(raised.value)


def test_a_sweep_is_read_with_the_same_eyes(tmp_path: Path) -> None:
    sweep_of = {"base": str(Path(QUICKSTART).absolute()), "searcher": "grid"}
    for changes in (
        {"space": {"storage.url": {"grid": [f"s3://b?sig={PLANTED}", "s3://c"]}}},
        {"space": {"method.temperature": {"grid": [0.1]}}, "set": {"cluster.env": {"DB_PASSWD": PLANTED}}},
        {"space": {"method.temperature": {"grid": [0.1]}}, "set": {"tracking.uri": f"http://{PLANTED}@host"}},
    ):
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(sweep_of | changes))
        with pytest.raises((SweepError, ConfigError)) as caught:
            load_sweep(file)
        assert PLANTED not in str(caught.value)
        assert "secret by its name" in str(caught.value) or "holds a" in str(caught.value)


JOBS: list[tuple[Callable[[], object], list[str]]] = [
    (embed.main, ["--model", "models:/m/1", "--data", "d", "--out", "o", "--tracking-uri", "{secret}"]),
    (embed.main, ["--model", "models:/m/1", "--data={secret}", "--out", "o"]),
    (index.main, ["{secret}"]),
    (pretrain.main, [QUICKSTART, "--dry-run", "tracking.uri={secret}"]),
    (pretrain.main, ["{secret}"]),
    (preview.main, [QUICKSTART, "x.png", "data.shards={secret}"]),
    (pull.main, ["models:/m/1", "--out", "o", "--tracking-uri={secret}"]),
    (queue.main, ["status", "--address", "{secret}"]),
    (rayjob.main, [QUICKSTART, "--image", "{secret}"]),
    (sweep.main, ["configs/sweep/digits-moco.yaml", "storage.url={secret}"]),
    (write_shards.main, ["{secret}", "here"]),
    (write_shards.main, ["--verify", "{secret}"]),
    (pull.main, ["models:/m/1", "--out", "o", "--password={secret}"]),  # no such option: argparse quotes it
]


@pytest.mark.parametrize(("main", "arguments"), JOBS)
@pytest.mark.parametrize("secret", [BY_VALUE["password in a URL"], BY_VALUE["AWS signature"], f"token={PLANTED}"])
def test_every_command_line_refuses_secrets_and_repeats_none(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], object],
    arguments: list[str],
    secret: str,
) -> None:
    refused(monkeypatch, main, "job", *(argument.format(secret=secret) for argument in arguments))
    printed = "".join(capsys.readouterr())
    assert PLANTED not in printed
    assert "holds a" in printed


def test_what_is_harmless_passes(tmp_path: Path) -> None:
    for value in HARMLESS:
        assert secret_in(value) is None, value
        assert redacted(f"got {value!r}") == f"got {value!r}"
    for path in Path("configs").rglob("*.yaml"):
        assert list(objections(yaml.safe_load(path.read_text()))) == [], path
    keys = [key for path in sorted(Path("configs/pretrain").glob("*.yaml")) for key in load_config(path).flat()]
    assert [key for key in keys if any(map(is_secret_name, key.split(".")))] == []
    fine = {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "HTTPS_PROXY": "http://proxy:3128", "PWD": "/home"}
    fine |= {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "MAX_TOKEN_LENGTH": "77",
        "GOOGLE_APPLICATION_CREDENTIALS": "/keys/gcp.json",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    }
    assert ClusterConfig(env=fine).env == fine
    switches = ["model.name=vit_small_patch16_224", "model.args={class_token: true, reg_tokens: 4, global_pool: token}"]
    assert load_config(QUICKSTART, [*switches, "model.image_size=224"]).model.args["reg_tokens"] == 4


def test_no_message_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in BY_VALUE.values():
        for text in (secret, f"cannot read {secret}: gone", f"{{'x': {secret!r}}}"):
            assert PLANTED.lower() not in str(UserError(text)).lower()
            assert without_secrets(without_secrets(text)) == without_secrets(text)
    for text in (f"DB_PASSWD={PLANTED}", f"line 1:\n  password: {PLANTED}\n", f'{{"client_secret": "a {PLANTED}"}}'):
        assert PLANTED not in str(UserError(text))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cr%40t@proxy:1")
    shown = str(UserError("server says: abc/def+ghi is wrong, s3cr@t too; abc/def+ghij is fine"))
    assert shown == f"server says: {HIDDEN} is wrong, {HIDDEN} too; abc/def+ghij is fine"


def test_what_is_written_passes_the_same_function() -> None:
    """Beyond configs, which hold none: a card or parameters that other code makes."""
    card = ModelCard(
        run_id="x", method="simclr", data_digest="d", git_sha="g", metrics=(),
        hyperparameters={"tracking.uri": BY_VALUE["token in a URL"], "cluster.env.DB_PASSWD": PLANTED, "seed": "1"},
    )  # fmt: skip
    assert card.hyperparameters == {
        "tracking.uri": f"https://{HIDDEN}@mlflow",
        "cluster.env.DB_PASSWD": HIDDEN,
        "seed": "1",
    }


def test_a_rendered_job_passes_the_environment_s_secrets_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HTTPS_PROXY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, PLANTED)
    config: Config = load_config(QUICKSTART, ["storage.url=s3://b/x", "tracking.uri=http://mlflow:5000"])
    rendered = yaml.safe_dump(ray_job(config, image="parallax:test"))
    assert PLANTED not in rendered
    assert "name: HTTPS_PROXY" in rendered
    assert "name: AWS_SESSION_TOKEN" in rendered


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIA{}",
    "AWS_SECRET_ACCESS_KEY": "{}",
    "AWS_SESSION_TOKEN": "{}",
    "AZURE_STORAGE_KEY": "{}==",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey={}",
    "DATABASE_URL": "postgresql://me:{}@127.0.0.1/db",
    "DB_PASSWD": "{}",
    "GH_PAT": "ghp_{}0123456789",
    "HF_TOKEN": "hf_{}0123456789",
    "HTTPS_PROXY": "http://me:{}@127.0.0.1:9",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": "{}",
    "SSH_PRIVATE_KEY": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----",
    "WANDB_API_KEY": "{}",
}


@pytest.fixture
def planted(mlflow_server: MLflowServer) -> dict[str, str]:
    """Environment variables with secrets; MLFLOW_TRACKING_URI too, which works with a password in it."""
    secrets = {name: pattern.format(f"{PLANTED}{i:02}") for i, (name, pattern) in enumerate(ENVIRONMENT.items())}
    return secrets | {"MLFLOW_TRACKING_URI": mlflow_server.uri.replace("://", f"://me:{PLANTED}99@")}


@pytest.mark.integration
def test_the_registry_is_told_no_secret(
    tmp_path: Path,
    mlflow_server: MLflowServer,
    planted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    uri = choose("", "--tracking-uri", "").uri
    with Tracker(uri, "secrets", "r-1", {"from": BY_VALUE["token in a URL"]}) as tracker:
        tracker.log_config({f"a.{i}": secret for i, secret in enumerate(BY_VALUE.values())})
        tracker.log_config({"cluster.env.DB_PASSWD": PLANTED})
        tracker.log_dataset(BY_VALUE["Azure SAS"], "0" * 64)
    assert b"cluster.env.DB_PASSWD" in Path(mlflow_server.folder, "mlflow.db").read_bytes()
    refused(monkeypatch, pull.main, "job", "models:/nobody/1", "--out", str(tmp_path / "out"))
    printed = "".join(capsys.readouterr())
    assert f"not in the registry at {mlflow_server.uri}" in printed
    assert holders_of_secrets(printed, mlflow_server.folder) == []


@pytest.mark.heavy  # 40 CPU-s
@pytest.mark.integration
def test_a_run_with_secrets_in_its_environment_writes_none_of_them(
    tmp_path: Path, mlflow_server: MLflowServer, planted: dict[str, str]
) -> None:
    """In the longest temporary folder that Ray is allowed."""
    temporary = Path(tempfile.mkdtemp(prefix="parallax-secrets-"))
    temporary = Path(shutil.move(temporary, str(temporary).ljust(39, "x")))
    environment = {**os.environ, **planted, "RAY_TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    shards, storage = few_digits(f"{tmp_path}/shards"), tmp_path / "storage"
    command = [sys.executable, "-m", "jobs.pretrain", QUICKSTART, *SMALL, f"data.shards={shards}"]
    command += [f"storage.url={storage}", "registry.model_name=toy", "cluster.num_workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    try:
        assert done.returncode == 0, done.stderr + done.stdout
        assert list(storage.glob("runs/*/registered.json"))
        assert list(temporary.glob("ray/session_*/logs/raylet.out")), "Ray wrote its logs elsewhere"
        assert holders_of_secrets(done.stdout + done.stderr, storage, temporary, mlflow_server.folder) == []
    finally:
        shutil.rmtree(temporary)


def holders_of_secrets(printed: str, *folders: Path) -> list[str]:
    """The files that hold what was planted, as it is or as HTTP's basic authentication has it."""
    contents = {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    contents["printed"] = printed.encode()
    forms = PLANTED.encode(), base64.b64encode(b"me:" + PLANTED.encode())[:20]
    return [name for name, content in contents.items() if any(form in content for form in forms)]
