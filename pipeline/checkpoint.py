"""Checkpoints: everything that resumes, written atomically to any storage URL, read back at any world size.

A checkpoint is two objects, ``step-000000123.pt`` and then ``step-000000123.json`` with its size and sha256.
The JSON is written last, so a checkpoint exists exactly when its JSON does: a kill at any moment leaves the
previous one in charge. Ray's own checkpoint manager is not used: its controller dies of a 12 s storage stall.

Both objects say which run and which step they are of, and a load compares that with the name they lie under: a digest
beside the data moves with it when somebody copies or renames the pair. What an older version wrote names no run; it is
read, and its step is compared.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch
from pydantic import BaseModel, ConfigDict

from pipeline import storage
from pipeline.errors import UserError


class TrainState(TypedDict):
    """What a run resumes from. Randomness is a pure function of (seed, step), so no RNG state is among it."""

    step: int  # optimizer steps done; with the seed and the manifest this is the whole data state
    seed: int
    manifest_digest: str
    method: dict[str, Any]  # backbone, heads, momentum encoder, negatives, BN statistics
    optimizer: dict[str, Any]
    config: str  # YAML, for people and for what must not differ
    mlflow_run_id: str


class CheckpointError(UserError):
    """A checkpoint is damaged or belongs to another run."""


class _Commit(BaseModel):
    """What ``step-*.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    size: int  # bytes of the payload
    sha256: str
    run_id: str = ""  # "": written by a version that did not say


class CheckpointStore:
    """The checkpoints of one run, under one URL, and the lists that lie beside them."""

    def __init__(self, url: str, run_id: str, keep: int = 2) -> None:
        """``keep``: how many of the newest checkpoints stay."""
        self.url = url
        self.run_id = run_id
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not storage.exists(self.url):
            return []
        names = storage.list_sizes(self.url)
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d{9})\.json", name)))

    def latest_step(self) -> int | None:
        """The newest step with a complete checkpoint; None if there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, state: TrainState) -> None:
        """Write ``state`` as the run's checkpoint of its step, then drop what ``keep`` no longer covers."""
        buffer = io.BytesIO()
        torch.save({**state, "run_id": self.run_id}, buffer)
        payload = buffer.getvalue()
        step = state["step"]
        storage.write_bytes(self._payload_url(step), payload)
        commit = _Commit(step=step, size=len(payload), sha256=hashlib.sha256(payload).hexdigest(), run_id=self.run_id)
        storage.write_bytes(self._commit_url(step), commit.model_dump_json().encode())
        for old in self.steps()[: -self.keep]:
            storage.delete(self._commit_url(old))  # first: without it the payload is not a checkpoint
            storage.delete(self._payload_url(old))

    def adopt(self, other: "CheckpointStore", step: int) -> None:
        """Begin with another run's state after ``step`` as one's own. CheckpointError as ``load``."""
        self.save(other.load(step))

    def load(self, step: int) -> TrainState:
        """Read the checkpoint of ``step`` onto the CPU.

        CheckpointError if its bytes are not those written, or are another run's or another step's.
        """
        commit_url, payload_url = self._commit_url(step), self._payload_url(step)
        try:
            commit = _Commit.model_validate_json(storage.read_bytes(commit_url))
        except ValueError as error:
            raise self._unreadable(step, f"{commit_url} is damaged, it holds no step, size and sha256") from error
        self._require_own(commit_url, step, commit.model_dump())
        try:
            payload = storage.read_bytes(payload_url)
        except storage.MissingError as error:
            raise self._unreadable(step, f"{payload_url} is missing") from error
        digest = hashlib.sha256(payload).hexdigest()
        if (len(payload), digest) != (commit.size, commit.sha256):
            raise self._unreadable(
                step,
                f"{payload_url} is damaged: {len(payload)} bytes with sha256 {digest[:12]}..., "
                f"written were {commit.size} with {commit.sha256[:12]}...",
            )
        state = self._unpickled(step, payload)
        self._require_own(payload_url, step, state)
        return state

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep a list beside the checkpoints, as the run's."""
        content = {"run_id": self.run_id, "rows": list(rows)}
        storage.write_bytes(storage.join(self.url, name), json.dumps(content, indent=1).encode())

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """What ``write_rows`` has written; empty if there is none. CheckpointError if another run's list lies there.

        ValueError or TypeError for what is no list.
        """
        url = storage.join(self.url, name)
        if not storage.exists(url):
            return []
        content = json.loads(storage.read_bytes(url))
        if isinstance(content, list):  # written by a version that did not say whose it is
            return content
        if not isinstance(content, dict) or content.keys() != {"run_id", "rows"}:
            raise ValueError("it holds no rows of a run")
        if content["run_id"] != self.run_id:
            raise CheckpointError(
                f"{url} is of the run {content['run_id']}, not of {self.run_id}: it was copied here; delete it"
            )
        rows: list[dict[str, Any]] = content["rows"]
        return rows

    def _unpickled(self, step: int, payload: bytes) -> TrainState:
        try:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        except Exception as error:  # what torch stumbles over in a damaged pickle has any type
            raise self._unreadable(step, f"{self._payload_url(step)} is no state of a run: {error}") from error
        if not isinstance(state, dict) or not state.keys() >= TrainState.__required_keys__:
            raise self._unreadable(step, f"{self._payload_url(step)} is no state of a run")
        return state  # type: ignore[return-value]

    def _require_own(self, url: str, step: int, found: Mapping[str, Any]) -> None:
        run_id = found.get("run_id") or self.run_id
        if (found["step"], run_id) != (step, self.run_id):
            raise self._unreadable(
                step,
                f"{url} is of step {found['step']} of the run {run_id}, not of step {step} of {self.run_id}: it was "
                "copied or renamed",
            )

    def _unreadable(self, step: int, reason: str) -> CheckpointError:
        before = [other for other in self.steps() if other < step] or "none"
        return CheckpointError(f"{reason}; delete {self._commit_url(step)} to resume from the one before ({before})")

    def _payload_url(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:09d}.pt")

    def _commit_url(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:09d}.json")
