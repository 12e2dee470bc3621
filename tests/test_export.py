"""What is exported gives the promised embeddings, or is not there at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from pipeline.archive import load_archive
from pipeline.data.loader import centre_crop, normalize, shorter_side
from pipeline.export import (
    ExportError,
    check_bundle,
    check_golden,
    export_encoder,
    load_with_timm,
    read_preprocessing,
)
from pipeline.models.backbone import BackboneConfig, random_backbone
from tests.encoders import CARD, MEAN, STD, export_tiny, golden_images, of_another_run, tiny_backbone


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("export") / "encoder")


def test_golden_embeddings_are_those_of_the_backbone_on_normalised_images(bundle: Path) -> None:
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden:
        images, embeddings = golden["images"], golden["embeddings"]
    assert (images == golden_images().numpy()).all()
    mean, std = (np.array(c, np.float64).reshape(3, 1, 1) for c in (MEAN, STD))
    with torch.inference_mode():
        expected = tiny_backbone()(torch.from_numpy((images.astype(np.float64) / 255 - mean) / std).float())
    np.testing.assert_allclose(embeddings, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_preprocessing_survives_in_config_json(bundle: Path) -> None:
    assert read_preprocessing(bundle) == (28, MEAN, STD)


@pytest.mark.parametrize("size", [28, 64, 96, 224])
def test_timm_resizes_and_crops_as_the_loader_does(size: int, tmp_path: Path) -> None:
    backbone = random_backbone(BackboneConfig(name="resnet18", args={"channels": [4, 4, 4, 4]}, image_size=size), 0)
    images = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    export_encoder(backbone, tmp_path / "encoder", mean=MEAN, std=STD, golden_images=images, card=CARD)
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    assert (transform.transforms[0].size, tuple(transform.transforms[1].size)) == (shorter_side(size), (size, size))
    for photo in (load_sample_image("china.jpg"), load_sample_image("flower.jpg").transpose(1, 0, 2)):
        theirs = transform(Image.fromarray(np.ascontiguousarray(photo)))
        ours = normalize(torch.from_numpy(centre_crop(photo, size)).permute(2, 0, 1)[None], MEAN, STD)[0]
        levels = (ours - theirs).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        assert levels.mean() < 0.3
        assert levels.max() < 2.5


def test_timm_fine_tunes_it_with_a_new_head(bundle: Path) -> None:
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True, num_classes=10).eval()
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    for name, weight in tiny_backbone().net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_an_encoder_with_the_cifar_stem_loads_by_timm_and_two_lines_or_not_at_all(tmp_path: Path) -> None:
    backbone = tiny_backbone(stem="cifar")
    assert not torch.equal(backbone.net.conv1.weight, tiny_backbone(seed=1, stem="cifar").net.conv1.weight)  # type: ignore[union-attr, arg-type]
    bundle = export_tiny(tmp_path / "encoder", backbone)
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(load_with_timm(bundle)(images), backbone(images))
        torch.testing.assert_close(load_archive(bundle / "model.pt2")(images), backbone(images), rtol=1e-4, atol=1e-5)
    assert json.loads((bundle / "config.json").read_text())["stem"] == "cifar"
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1.weight"):
        timm.create_model(f"local-dir:{bundle}", pretrained=True)


def test_no_path_of_this_machine_is_in_the_files(bundle: Path) -> None:
    for file in bundle.iterdir():
        assert str(Path(timm.__file__).parent).encode() not in file.read_bytes(), file.name


def test_the_digest_is_of_the_run_and_the_weights_not_of_the_bytes_of_the_graph(bundle: Path, tmp_path: Path) -> None:
    digest = check_bundle(bundle).digest
    assert check_bundle(export_tiny(tmp_path / "again")).digest == digest
    assert check_bundle(export_tiny(tmp_path / "other", tiny_backbone(seed=1))).digest != digest
    assert check_bundle(of_another_run(bundle, tmp_path / "run", "tiny-1111111111")).digest != digest


@pytest.mark.parametrize("name", ["model.pt2", "model.safetensors", "config.json", "golden.npz"])
def test_a_damaged_or_missing_file_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = of_another_run(bundle, tmp_path / "copy", "x")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ExportError, match=rf"{name} is damaged"):
        check_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(ExportError, match=rf"{name} is missing"):
        check_bundle(copy)


def test_a_missing_card_for_people_is_named(bundle: Path, tmp_path: Path) -> None:
    copy = of_another_run(bundle, tmp_path / "copy", "x")
    (copy / "README.md").unlink()
    with pytest.raises(ExportError, match=r"README\.md is missing"):
        check_bundle(copy)


@pytest.mark.parametrize("damage", [b"{", b"\xff", None])
def test_a_damaged_card_is_named(bundle: Path, tmp_path: Path, damage: bytes | None) -> None:
    card = of_another_run(bundle, tmp_path / "copy", "x") / "card.json"
    text = card.read_text()
    card.unlink()
    if damage is None:
        card.mkdir()
    else:
        card.write_bytes(damage)
    with pytest.raises(ExportError, match=r"card\.json is damaged: .*; export"):
        check_bundle(card.parent)
    if damage is not None:
        card.write_text(json.dumps(json.loads(text) | {"files": {}}))
        with pytest.raises(ExportError, match=r"card\.json is damaged: it lists the files none, not model\.pt2"):
            check_bundle(card.parent)


def test_golden_check_catches_other_weights_and_another_mean(bundle: Path, tmp_path: Path) -> None:
    check_golden(load_archive(bundle / "model.pt2"), bundle)
    random = timm.create_model(f"local-dir:{bundle}", pretrained=False).eval()
    with pytest.raises(ExportError, match="does not reproduce"):
        check_golden(random, bundle)
    copy = of_another_run(bundle, tmp_path / "copy", "x")
    config = json.loads((copy / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.485, 0.456, 0.406]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="does not reproduce"):
        check_golden(load_archive(copy / "model.pt2"), copy)


def test_golden_check_refuses_nan(bundle: Path) -> None:
    with pytest.raises(ExportError, match="does not reproduce"):
        check_golden(lambda images: torch.full((len(images), 64), torch.nan), bundle)


def test_an_export_that_fails_leaves_what_was_there(bundle: Path, tmp_path: Path) -> None:
    out = of_another_run(bundle, tmp_path / "out", "before")
    backbone = tiny_backbone()
    nn.init.constant_(backbone.net.conv1.weight, torch.nan)  # type: ignore[arg-type, union-attr]
    with pytest.raises(ExportError, match="does not reproduce"):
        export_tiny(out, backbone)
    assert check_bundle(out).card.run_id == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_the_last_one(bundle: Path, tmp_path: Path) -> None:
    out = of_another_run(bundle, tmp_path / "out", "before")
    assert check_bundle(export_tiny(out)).card.run_id == CARD.run_id


def test_golden_images_of_another_size_are_refused(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, 28, 28\), not .*32"):
        export_encoder(tiny_backbone(), tmp_path / "x", mean=MEAN, std=STD, golden_images=images, card=CARD)
