"""What lies in a run's folder says whose it is and of which step: a copy under another name is never taken for it."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import storage
from pipeline.checkpoint import CheckpointError, CheckpointStore, TrainState
from pipeline.config import Config, load_config, override
from pipeline.data.assemble import BadSample
from pipeline.data.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate.report import EvaluationReport
from pipeline.negatives.bank import MemoryBank
from pipeline.negatives.bank_shard import BankShard, BankSpec, Part
from pipeline.negatives.protocol import Reply, ShardsLostError
from pipeline.negatives.served_bank import ServedBank
from pipeline.negatives.shard import NotOpenError, ServiceError
from pipeline.quarantine import read_quarantine
from pipeline.runs import Registration, Run
from pipeline.selection import read_scores
from pipeline.stages import trained_encoder
from pipeline.train import fit
from tests.data.images import write_digits
from tests.strangers.mutated_archives import write_small

CPU = torch.device("cpu")


def state(step: int) -> TrainState:
    return TrainState(
        step=step, seed=0, manifest_digest="d", method={"w": torch.full((3,), float(step))}, optimizer={},
        config="", mlflow_run_id="",
    )  # fmt: skip


def copied(source: Path, target: Path, suffixes: Sequence[str] = (".pt", ".json")) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        shutil.copyfile(source.with_suffix(suffix), target.with_suffix(suffix))


def pair(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


# --- one store --------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Steps 4 and 8 of the run "a"."""
    store = CheckpointStore(str(tmp_path / "a"), "a")
    store.save(state(4))
    store.save(state(8))
    return store


def test_a_pair_under_another_name_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    copied(pair(tmp_path / "a", 4), pair(tmp_path / "a", 12))
    with pytest.raises(CheckpointError, match=r"12\.json is of step 4 of the run a, not of step 12.*delete .*\[4, 8\]"):
        store.load(12)
    copied(pair(tmp_path / "a", 4), pair(tmp_path / "a", 8))
    with pytest.raises(CheckpointError, match=r"8\.json is of step 4 .*\[4\]"):
        store.load(8)
    assert store.load(4)["step"] == 4


def test_a_commit_that_was_edited_to_fit_its_name_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    copied(pair(tmp_path / "a", 4), pair(tmp_path / "a", 8))
    commit = pair(tmp_path / "a", 8).with_suffix(".json")
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "step": 8}))
    with pytest.raises(CheckpointError, match=r"8\.pt is of step 4 of the run a, not of step 8 of a"):
        store.load(8)


@pytest.mark.parametrize("edited", [False, True])
def test_a_pair_of_another_run_is_refused(store: CheckpointStore, tmp_path: Path, edited: bool) -> None:
    copied(pair(tmp_path / "a", 8), pair(tmp_path / "b", 8))
    commit = pair(tmp_path / "b", 8).with_suffix(".json")
    if edited:
        commit.write_text(commit.read_text().replace('"a"', '"b"'))
    with pytest.raises(CheckpointError, match=r"of step 8 of the run a, not of step 8 of b: it was copied"):
        CheckpointStore(str(tmp_path / "b"), "b").load(8)


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_half_a_pair_of_another_step_is_refused(store: CheckpointStore, tmp_path: Path, suffix: str) -> None:
    copied(pair(tmp_path / "a", 4), pair(tmp_path / "a", 8), [suffix])
    with pytest.raises(CheckpointError, match=r"8\.pt is damaged|8\.json is of step 4"):
        store.load(8)


def test_a_size_is_compared_as_well_as_the_digest(store: CheckpointStore, tmp_path: Path) -> None:
    commit = pair(tmp_path / "a", 8).with_suffix(".json")
    commit.write_text(json.dumps({**json.loads(commit.read_text()), "size": 5}))
    with pytest.raises(CheckpointError, match=r"8\.pt is damaged: \d+ bytes .* written were 5"):
        store.load(8)


@pytest.mark.parametrize("content", [[1, 2], {"step": 8}, "text"])
def test_a_payload_with_the_right_digest_that_is_no_state_is_refused(
    store: CheckpointStore, tmp_path: Path, content: Any
) -> None:
    replace_payload(tmp_path / "a", content)
    with pytest.raises(CheckpointError, match=r"8\.pt is no state of a run; delete .*\[4\]"):
        store.load(8)


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\3\4", b"\x80\x02h\xc8.", b"\x80\x02X\x01\0\0\0\xff.", b"\x80\x02]q\0."],
    ids=["empty", "cut", "unknown memo", "no UTF-8", "no magic number"],
)
def test_a_payload_with_the_right_digest_that_torch_cannot_read_is_refused(
    store: CheckpointStore, tmp_path: Path, data: bytes
) -> None:
    """torch raises a KeyError for one, a UnicodeDecodeError for another."""
    replace_bytes(tmp_path / "a", data)
    with pytest.raises(CheckpointError, match=r"8\.pt is no state of a run.*; delete .*\[4\]"):
        store.load(8)


def replace_payload(folder: Path, content: Any) -> None:
    """Step 8 with another content, and a commit that vouches for it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_bytes(folder, buffer.getvalue())


def replace_bytes(folder: Path, data: bytes) -> None:
    payload, commit = (pair(folder, 8).with_suffix(suffix) for suffix in (".pt", ".json"))
    payload.write_bytes(data)
    digest = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit.write_text(json.dumps({**json.loads(commit.read_text()), **digest}))


def test_an_older_version_s_checkpoint_that_names_no_run_is_read_and_its_step_compared(
    store: CheckpointStore, tmp_path: Path
) -> None:
    replace_payload(tmp_path / "a", dict(state(8)))
    commit = pair(tmp_path / "a", 8).with_suffix(".json")
    old = {key: value for key, value in json.loads(commit.read_text()).items() if key != "run_id"}
    commit.write_text(json.dumps(old))
    assert store.load(8)["method"]["w"].tolist() == [8.0] * 3
    copied(pair(tmp_path / "a", 8), pair(tmp_path / "a", 12))
    with pytest.raises(CheckpointError, match=r"12\.json is of step 8"):
        store.load(12)


def test_an_adopted_checkpoint_is_one_s_own_and_a_misnamed_one_is_not_adopted(
    store: CheckpointStore, tmp_path: Path
) -> None:
    """As a trial of PBT begins with another one's."""
    child = CheckpointStore(str(tmp_path / "child"), "child")
    child.adopt(store, 8)
    assert child.load(8)["method"]["w"].tolist() == [8.0] * 3
    copied(pair(tmp_path / "a", 4), pair(tmp_path / "a", 8))
    with pytest.raises(CheckpointError, match=r"8\.json is of step 4"):
        CheckpointStore(str(tmp_path / "other"), "other").adopt(store, 8)
    assert not (tmp_path / "other").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two epochs of two steps on 100 real digits."""
    folder = tmp_path_factory.mktemp("integrity")
    write_digits(f"{folder}/shards", {"train": 100})
    return load_config(
        "configs/quickstart.yaml",
        [
            f"storage.url={folder}",
            f"data.shards={folder}/shards",
            "data.source=null",
            "model.args={channels: [4, 4, 4, 4]}",
            "train.global_batch_size=50",
            "train.epochs=2",
            "optim.warmup_epochs=0.5",
            "train.checkpoint_every_steps=1",
            "train.keep_checkpoints=9",
            "data.loader_workers=0",
        ],
    )


def train(run: Run) -> None:
    fit(run.config, Manifest.load(run.config.shards_url), run.checkpoints, device=CPU, report=lambda _: None)


@pytest.fixture(scope="module")
def trained(config: Config) -> Run:
    run = Run(config, Manifest.load(config.shards_url).digest)
    train(run)
    return run


def another(trained: Run, tmp_path: Path, change: str = "method.temperature=0.3") -> Run:
    """A run of its own storage that differs in one value."""
    return Run(override(trained.config, [change, f"storage.url={tmp_path}"]), trained.data_digest)


def test_an_early_checkpoint_under_the_last_one_s_name_does_not_complete_the_run(trained: Run, tmp_path: Path) -> None:
    run = another(trained, tmp_path, "seed=0")
    assert run.id == trained.id
    copied(pair(Path(trained.checkpoints.url), 1), pair(Path(run.checkpoints.url), 4))
    with pytest.raises(CheckpointError, match=r"000004\.json is of step 1 .*delete .*none"):
        train(run)
    with pytest.raises(CheckpointError, match=r"000004\.json is of step 1"):
        trained_encoder(run)


@pytest.mark.parametrize("change", ["method.temperature=0.3", "optim.lr=0.7", "train.epochs=5"])
def test_a_run_does_not_go_on_from_a_run_of_other_values(trained: Run, tmp_path: Path, change: str) -> None:
    """Whose checkpoint fits in seed, shards, model, method, optimizer and batch."""
    run = another(trained, tmp_path, change)
    copied(pair(Path(trained.checkpoints.url), 4), pair(Path(run.checkpoints.url), 4))
    for load in (train, trained_encoder):
        with pytest.raises(CheckpointError, match=f"of the run {trained.id}, not of step 4 of {run.id}"):
            load(run)


def report(run: Run) -> None:
    run.save_report(EvaluationReport(train_images=1, validation_images=1, num_classes=2), ())


def registration(run: Run) -> None:
    config = run.config
    run.save_registration(
        Registration(
            tracking_uri=config.tracking_uri,
            mlflow_run_id="m",
            name=config.registry.model_name,
            version="1",
            alias=config.registry.alias,
            model_uri="models:/m-1",
        )
    )


@pytest.mark.parametrize(
    ("name", "save", "read"),
    [("report.json", report, Run.report), ("registered.json", registration, Run.registration)],
)
def test_another_run_s_mark_completes_no_stage(
    config: Config, tmp_path: Path, name: str, save: Callable[[Run], None], read: Callable[[Run], Any]
) -> None:
    run = Run(override(config, [f"storage.url={tmp_path}"]), "digest")
    other = Run(override(run.config, ["seed=5"]), "digest")
    save(run)
    assert read(run) is not None
    storage.write_bytes(f"{other.url}/{name}", storage.read_bytes(f"{run.url}/{name}"))
    with pytest.raises(UserError, match=rf"{name} is of the run {run.id}, not of {other.id}: .*delete it and"):
        read(other)
    content = json.loads(storage.read_bytes(f"{run.url}/{name}"))
    del content["run_id"]
    storage.write_bytes(f"{other.url}/{name}", json.dumps(content).encode())
    assert read(other) is not None, "written by a version that named no run"


def test_another_run_s_encoder_is_not_registered_as_this_one_s(config: Config, tmp_path: Path) -> None:
    run = Run(override(config, [f"storage.url={tmp_path}"]), "digest")
    run.save_encoder(write_small(tmp_path / "encoder"))
    with pytest.raises(UserError, match=f"encoder is of the run tiny-0123456789, not of {run.id}"), run.local_encoder():
        pass


ROWS: dict[str, tuple[Callable[[CheckpointStore], Any], dict[str, Any]]] = {
    "quarantine.json": (read_quarantine, {"sample_id": 3, "shard": "train-000000.tar", "reason": "cut"}),
    "selection.json": (read_scores, {"step": 3, "epochs": 1, "knn": 0.5, "loss": 2.0}),
}


@pytest.mark.parametrize("name", ROWS)
def test_another_run_s_list_is_not_taken_for_this_one_s(tmp_path: Path, name: str) -> None:
    read, row = ROWS[name]
    mine, other = (CheckpointStore(str(tmp_path / run), run) for run in ("mine", "other"))
    assert read(mine) == ()
    other.write_rows(name, [row])
    assert len(read(other)) == 1
    storage.write_bytes(f"{mine.url}/{name}", storage.read_bytes(f"{other.url}/{name}"))
    with pytest.raises(CheckpointError, match=rf"{name} is of the run other, not of mine: it was copied here; delete"):
        read(mine)
    storage.write_bytes(f"{mine.url}/{name}", json.dumps([row]).encode())
    assert read(mine) == read(other), "written by a version that named no run"


def test_a_run_that_meets_another_run_s_list_of_bad_samples_does_not_start(trained: Run, tmp_path: Path) -> None:
    run = another(trained, tmp_path)
    CheckpointStore(run.checkpoints.url, "other").write_rows("quarantine.json", [vars(BadSample(0, "s", "r"))])
    with pytest.raises(CheckpointError, match=r"quarantine\.json is of the run other"):
        train(run)


# --- the shards of negatives ------------------------------------------------------------------------------------------

SAMPLES, DIM = 10, 4


class LocalShards:
    """Real shards, called without Ray between. A shard that is lost comes back empty."""

    def __init__(self, count: int) -> None:
        self._shards = [BankShard(index) for index in range(count)]
        self._lives = [0] * count

    def __len__(self) -> int:
        return len(self._shards)

    def lose(self, index: int) -> None:
        self._shards[index] = BankShard(index)
        self._lives[index] += 1

    def open(self, generation: int, spec: Any) -> list[int | None]:
        def life(shard: BankShard) -> int | None:
            try:
                shard.open(generation, spec)
            except NotOpenError:
                return None
            return self._lives[shard.index]

        return [life(shard) for shard in self._shards]

    def fill(self, generation: int, spec: Any, contents: Sequence[Any]) -> None:
        for shard, content in zip(self._shards, contents, strict=True):
            if content is not None:
                shard.fill(generation, spec, content)

    def exchange(
        self,
        generation: int,
        lives: Sequence[int],
        pushes: Sequence[Sequence[Any]],
        requests: Sequence[Any],
        *,
        caller: Mapping[str, float],
        at_least: int,
        wait_s: float,
    ) -> list[Reply]:
        try:
            return [
                self._exchange(shard, generation, rows, request)
                for shard, rows, request in zip(self._shards, pushes, requests, strict=True)
            ]
        except NotOpenError as error:
            raise ShardsLostError from error

    def _exchange(self, shard: BankShard, generation: int, rows: Sequence[Any], request: Any) -> Reply:
        for row in rows:
            shard.push(generation, row)
        answer = None if request is None else shard.read(generation, request)
        return Reply(self._lives[shard.index], shard.duplicates, answer)


def one_step(bank: ServedBank) -> None:
    ids = torch.arange(4)
    bank.expect(ids, 2)
    bank.read()
    bank.update(torch.randn(4, DIM), 0.5)


def bank_state(bank: MemoryBank | ServedBank, step: int) -> TrainState:
    saved = state(step)
    saved["method"] = dict(bank.state_dict(prefix="bank."))
    return saved


@pytest.mark.parametrize("of", ["this run", "another seed", "another step", "another size"])
def test_a_lost_shard_is_filled_from_this_bank_s_checkpoint_alone(tmp_path: Path, of: str) -> None:
    torch.manual_seed(0)
    saved = CheckpointStore(str(tmp_path), "run")
    shards = LocalShards(2)
    bank = ServedBank(MemoryBank(SAMPLES, DIM), shards, checkpoints=saved, name="bank")
    one_step(bank)
    if of == "this run":
        saved.save(bank_state(bank, 1))
    elif of == "another seed":
        stranger = MemoryBank(SAMPLES, DIM)
        stranger.steps = 1
        saved.save(bank_state(stranger, 1))
    elif of == "another step":
        saved.save(bank_state(MemoryBank(SAMPLES, DIM), 1))
    else:
        stranger = MemoryBank(SAMPLES + 1, DIM)
        stranger.steps, stranger.seed = 1, bank.seed
        saved.save(bank_state(stranger, 1))
    before = bank.state_dict()["slots"]
    shards.lose(1)
    if of == "this run":
        torch.testing.assert_close(bank.state_dict()["slots"], before, rtol=0, atol=0)
    else:
        with pytest.raises(ServiceError, match=r"the checkpoint of step 1 holds a bank after .* is another bank's"):
            bank.state_dict()
    bank.abandon()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (Part(7, 2, 5, None), "after 7 steps came"),
        (Part(3, 2, 6, None), "of 5 rows"),
        (Part(3, 2, 5, torch.zeros(2, 16, dtype=torch.uint8).numpy()), r"came as \(2, 16\)"),
    ],
)
def test_a_shard_takes_no_part_of_another_step_or_size(second: Part, message: str) -> None:
    spec = BankSpec(num_samples=10, dim=4, dtype="float32", seed=0, ranks=1, num_shards=2)
    shard = BankShard(1)
    shard.fill(1, spec, Part(3, 0, 2, None))
    with pytest.raises(ServiceError, match=message):
        shard.fill(1, spec, second)
    with pytest.raises(NotOpenError):
        shard.open(1, spec)
