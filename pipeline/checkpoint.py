"""Checkpoints: everything that resumes, written atomically to any storage URL, read back at any world size.

A checkpoint is two objects, ``step-000000123.pt`` and then ``step-000000123.json`` with its size and sha256.
The JSON is written last, so a checkpoint exists exactly when its JSON does: a kill at any moment leaves the
previous one in charge. Ray's own checkpoint manager is not used: its controller dies of a 12 s storage stall.
"""

import hashlib
import io
import json
import re
from typing import Any, TypedDict

import torch

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


class CheckpointStore:
    """The checkpoints of one run, under one URL."""

    def __init__(self, url: str, keep: int = 2) -> None:
        """``keep``: how many of the newest checkpoints stay."""
        self.url = url
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
        """Write ``state`` as the checkpoint of its step, then drop what ``keep`` no longer covers."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        payload = buffer.getvalue()
        step = state["step"]
        storage.write_bytes(self._payload_url(step), payload)
        commit = {"step": step, "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        storage.write_bytes(self._commit_url(step), json.dumps(commit).encode())
        for old in self.steps()[: -self.keep]:
            storage.delete(self._commit_url(old))  # first: without it the payload is not a checkpoint
            storage.delete(self._payload_url(old))

    def adopt(self, other: "CheckpointStore", step: int) -> None:
        """Copy another run's checkpoint of ``step``."""
        storage.write_bytes(self._payload_url(step), storage.read_bytes(other._payload_url(step)))
        storage.write_bytes(self._commit_url(step), storage.read_bytes(other._commit_url(step)))

    def load(self, step: int) -> TrainState:
        """Read the checkpoint of ``step`` onto the CPU. CheckpointError if its bytes are not those written."""
        commit_url, payload_url = self._commit_url(step), self._payload_url(step)
        try:
            commit = json.loads(storage.read_bytes(commit_url))
            size, sha256 = int(commit["size"]), str(commit["sha256"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._unreadable(step, f"{commit_url} is damaged, it holds no size and sha256") from error
        try:
            payload = storage.read_bytes(payload_url)
        except storage.MissingError as error:
            raise self._unreadable(step, f"{payload_url} is missing") from error
        digest = hashlib.sha256(payload).hexdigest()
        if digest != sha256:
            raise self._unreadable(
                step,
                f"{payload_url} is damaged: {len(payload)} bytes with sha256 {digest[:12]}..., "
                f"written were {size} with {sha256[:12]}...",
            )
        state: TrainState = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return state

    def _unreadable(self, step: int, reason: str) -> CheckpointError:
        before = self.steps()[:-1] or "none"
        return CheckpointError(f"{reason}; delete {self._commit_url(step)} to resume from the one before ({before})")

    def _payload_url(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:09d}.pt")

    def _commit_url(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:09d}.json")
