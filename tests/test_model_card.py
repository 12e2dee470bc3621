"""The card's snippets run verbatim in a process that has none of our code."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import decode
from pipeline.registry.pull import pull
from pipeline.registry.register import register_encoder
from pipeline.registry.tracking import Tracker
from tests.encoders import export_tiny, tiny_backbone


@pytest.fixture(scope="module", params=["imagenet", "cifar"])
def entry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry entry, pulled: the folder that the card speaks of; of an encoder with each stem."""
    folder = tmp_path_factory.mktemp("card")
    uri = f"sqlite:///{folder}/mlflow.db"
    with Tracker(uri, "cards", "tiny") as tracker:
        register_encoder(
            export_tiny(folder / "encoder", tiny_backbone(stem=request.param)),
            tracking_uri=uri,
            mlflow_run_id=tracker.mlflow_run_id,
            model_name="tiny",
            alias="champion",
            tags={},
        )
    return pull("models:/tiny@champion", uri, folder / "entry").folder


def snippets(entry: Path) -> dict[str, str]:
    """The card's Python snippets, by what they load with."""
    card = (entry / "extra_files" / "README.md").read_text()
    with_mlflow, with_timm, opaque = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return {"mlflow": with_mlflow, "timm": with_timm, "opaque": opaque}


def run_without(blocked: tuple[str, ...], code: str, entry: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` inside the entry's folder, in an interpreter that cannot import ``blocked``."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run([sys.executable, "-c", block + code], cwd=entry, capture_output=True, text=True, timeout=300)


def test_model_pt2_needs_torch_and_mlflow_alone(entry: Path) -> None:
    before = sorted(path.name for path in entry.iterdir())
    done = run_without(("pipeline", "jobs", "timm"), snippets(entry)["mlflow"], entry)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in entry.iterdir()) == before  # no ./mlruns, no ./mlflow.db


def test_the_safetensors_need_timm_alone(entry: Path) -> None:
    done = run_without(("pipeline", "jobs", "mlflow"), snippets(entry)["timm"], entry)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pipeline", "jobs", "timm", "mlflow"])
def test_the_blocked_packages_are_blocked(entry: Path, name: str) -> None:
    assert "ModuleNotFoundError" in run_without((name,), f"import {name}", entry).stderr


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_images_are_laid_on_white_as_in_training(entry: Path, mode: str) -> None:
    given = Image.effect_noise((20, 10), 90).convert("RGBA")
    given.putalpha(Image.linear_gradient("L").resize((20, 10)))
    given = given.convert(mode)
    given.save(file := io.BytesIO(), "PNG")
    defined: dict[str, Any] = {}
    exec(snippets(entry)["opaque"], defined)
    assert np.abs(np.int64(defined["opaque"](given)) - decode(file.getvalue())).max() <= 1


def test_the_snippets_notice_random_weights(entry: Path) -> None:
    code = snippets(entry)["timm"]
    random = code.replace("pretrained=True", "pretrained=False")
    random = re.sub(r"timm.models.load_checkpoint\((.*), .*\)", r"\1", random)
    assert random != code
    assert "not the encoder this card describes" in run_without(("pipeline",), random, entry).stderr


def test_the_card_says_where_the_encoder_comes_from(entry: Path) -> None:
    text = (entry / "extra_files" / "README.md").read_text()
    files = json.loads((entry / "extra_files" / "card.json").read_text())["files"]
    for fact in (
        "tiny-0123456789",  # the run
        "d" * 64,  # the data
        "a" * 40,  # the code
        files["golden.npz"],
        "| `method.temperature` | `0.2` |",
        "| knn | 0.9000 | 0.8000 | 0.7000 |",
        "| rank_me | 31.5000 | - | - |",
        "- mean `[0.5, 0.4, 0.3]`",
        "28 x 28 pixels",
    ):
        assert fact in text
