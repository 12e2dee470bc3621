"""The small files of a run's folder that mark its stages as complete."""

from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import load_config
from pipeline.errors import UserError
from pipeline.runs import Run


@pytest.mark.parametrize("name", ["report.json", "registered.json"])
@pytest.mark.parametrize("damage", [b"{", b"{}", b"\xff"])
def test_a_damaged_mark_is_named_with_what_to_do(tmp_path: Path, name: str, damage: bytes) -> None:
    run = Run(load_config("configs/quickstart.yaml", [f"storage.url={tmp_path}"]), "digest")
    assert run.report() is None
    assert run.registration() is None
    storage.write_bytes(f"{run.url}/{name}", damage)
    with pytest.raises(UserError, match=rf"{name} is damaged: .*delete it and submit the run again"):
        run.report() if name == "report.json" else run.registration()
