"""A bound on a bundle's files is a bound on what comes of them: malformed, inflated or endless, each is one error."""

import json
import operator
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from pipeline.archive import ArchiveError, load_archive
from pipeline.export import ExportError, check_bundle, check_golden
from pipeline.rehearsal import OverrunError, rehearse
from tests.encoders import with_digests
from tests.strangers.mutated_archives import mutated, rewritten, write_small

SYMBOL = "Symbol('s77', positive=True, integer=True)"
GRAPH, WEIGHTS = "models/model.json", "weights/model_weights_config.json"
Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small"))


def with_json(name: str, change: Change) -> Callable[[str, bytes], bytes]:
    def apply(record: str, content: bytes) -> bytes:
        if not record.endswith(name):
            return content
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return apply


def nodes(program: Any) -> list[Any]:
    found: list[Any] = program["graph_module"]["graph"]["nodes"]
    return found


def tensor_values(program: Any) -> Any:
    return program["graph_module"]["graph"]["tensor_values"]


def first_weight(payload: Any) -> Any:
    return next(iter(payload["config"].values()))


def relu_of(size: str) -> Change:
    def change(program: Any) -> None:
        (symbol,) = program["range_constraints"]
        tensor_values(program)["relu"]["sizes"][0] = {
            "as_expr": {"expr_str": size.replace("s77", symbol), "hint": None}
        }

    return change


def pad(program: Any) -> None:
    arguments = [{"name": "padding", "arg": {"as_ints": [10**4, 10**4]}, "kind": 1}]
    nodes(program)[0]["inputs"] += arguments


# --- sizes, depths and numbers of model.pt2 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        "Pow(Integer(9), Pow(Integer(9), Pow(Integer(9), Integer(9))))",
        "9**9**9**9",
        f"Mul({', '.join([SYMBOL] * 3)})",
        f"FloorDiv(Integer(1), {SYMBOL})",
        f"Add({', '.join(['Integer(1)'] * 50)})",
        f"Integer({2**63})",
        f"ModularIndexing({SYMBOL}, Integer(3), Integer(7))",
        "(" * 150 + "1" + ")" * 150,
        "-" * 299 + "1",
        "Symbol('s1234567')",
    ],
)
def test_a_size_that_takes_for_ever_is_refused(small: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(ArchiveError, match="not linear in the input's sizes"):
        load_archive(rewritten(small / "model.pt2", tmp_path / "model.pt2", with_json(GRAPH, relu_of(size))))


@pytest.mark.parametrize("size", [f"Mul(Integer(49), {SYMBOL})", f"Add(FloorDiv({SYMBOL}, Integer(2)), Integer(-1))"])
def test_a_linear_size_is_loaded(small: Path, tmp_path: Path, size: str) -> None:
    load_archive(rewritten(small / "model.pt2", tmp_path / "model.pt2", with_json(GRAPH, relu_of(size))))


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        # torch counts up to the number in the name of an unbacked symbol
        (GRAPH, lambda p: p["range_constraints"].update(u999999999999={"min_val": 0, "max_val": 1}), "has the sizes"),
        (GRAPH, lambda p: p["range_constraints"].update({f"s{i}": {} for i in range(20)}), "not at most 16"),
        (GRAPH, lambda p: nodes(p).extend([{}] * 10_000), "10005 operators, at most 10000"),
        (GRAPH, lambda p: p.update(torch_version="2" * (9 << 20)), "bytes, at most 8388608"),
        (GRAPH, lambda p: p.update(verifiers=json.loads("[" * 40 + "]" * 40)), "nested more than 32 deep"),
        (GRAPH, lambda p: p.update(schema_version={"major": 2**64, "minor": 0}), "has 65 bits"),
        (GRAPH, lambda p: p.update(torch_version="(lambda: 0)()"), "where a name or a number should be"),
        (WEIGHTS, lambda c: first_weight(c).update(path_name="../weight_0"), "a name or a number"),
        (WEIGHTS, lambda c: first_weight(c).update(path_name="tensor_0"), "only raw tensors"),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(sizes=[{"as_int": 2**40}]), "1099511627776 numbers"),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(sizes=[{"as_int": -1}]), "-1 numbers"),
        # the product of so many sizes, and a tensor of so many dimensions, take minutes
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(sizes=[{"as_int": 2**60}] * 200_000), "200000 dim"),
        (GRAPH, lambda p: tensor_values(p)["relu"].update(sizes=[{"as_int": 1}] * 17), "17 dimensions, at most 16"),
        (GRAPH, lambda p: nodes(p)[2].update(target="torch.ops.aten._sparse_coo_tensor_unsafe.default"), "calls"),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(strides=[{"as_int": 2**40}] * 4), "damaged: Runtime"),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(storage_offset={"as_int": 2**40}), "damaged"),
    ],
)  # fmt: skip
def test_what_torch_would_build_without_end_is_refused(
    small: Path, tmp_path: Path, record: str, change: Change, message: str
) -> None:
    with pytest.raises(ArchiveError, match=message):
        load_archive(rewritten(small / "model.pt2", tmp_path / "model.pt2", with_json(record, change)))


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (GRAPH, lambda p: p.pop("guards_code")),
        (GRAPH, lambda p: p.update(graph_module=[])),
        (GRAPH, lambda p: p.update(range_constraints=7)),
        (GRAPH, lambda p: p.update(treespec_namedtuple_fields=1.5, graph_module=None)),
        (GRAPH, lambda p: nodes(p)[0].update(inputs=5)),
        (GRAPH, lambda p: nodes(p)[0].update(outputs=[])),
        (GRAPH, lambda p: p["graph_module"]["graph"].update(outputs=[{"as_tensor": {"name": "nobody"}}])),
        (WEIGHTS, lambda c: c.pop("config")),
        (WEIGHTS, lambda c: c["config"].update(x=None)),
        (WEIGHTS, lambda c: first_weight(c).update(tensor_meta=None)),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(sizes=[{"as_int": "3"}])),
        (WEIGHTS, lambda c: first_weight(c)["tensor_meta"].update(dtype=99)),
        (WEIGHTS, lambda c: c["config"].popitem()),
    ],
)
def test_what_is_malformed_is_an_archive_error(small: Path, tmp_path: Path, record: str, change: Change) -> None:
    with pytest.raises(ArchiveError, match=r"model\.pt2"):
        load_archive(rewritten(small / "model.pt2", tmp_path / "model.pt2", with_json(record, change)))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a": ' * 5000, b"\xff\xfe", b"[]", b"1" * 5000])
def test_a_graph_that_is_no_program_is_an_archive_error(small: Path, tmp_path: Path, content: bytes) -> None:
    crafted = rewritten(
        small / "model.pt2", tmp_path / "model.pt2", lambda name, old: content if name.endswith(GRAPH) else old
    )
    with pytest.raises(ArchiveError, match=r"model\.pt2 is damaged: \w+"):
        load_archive(crafted)


# --- the zip file -----------------------------------------------------------------------------------------------------


def deflated(target: Path) -> None:
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/weights/weight_99", bytes(50 << 20))
    assert target.stat().st_size < 1 << 20


def deflated_graph(target: Path) -> None:
    with zipfile.ZipFile(target) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name.endswith(GRAPH) else zipfile.ZIP_STORED)


def many(target: Path) -> None:
    with zipfile.ZipFile(target, "a") as archive:
        for number in range(100, 10_100):
            archive.writestr(f"model/data/weights/weight_{number}", b"")


def overlapping(target: Path) -> None:
    """The directory names one record of 1 MB a hundred times."""
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("model/data/weights/weight_99", bytes(1 << 20))
        entry = archive.infolist()[-1]
        archive.filelist += [entry] * 99


def longer_than_the_file(target: Path) -> None:
    """Zip64: a stored record of 2**40 bytes."""
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("model/data/weights/weight_99", b"x")
        archive.infolist()[-1].file_size = archive.infolist()[-1].compress_size = 2**40


def absolute(target: Path) -> None:
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("/etc/data/weights/weight_99", b"x")


def all_above(target: Path) -> None:
    with zipfile.ZipFile(target) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"../{name.partition('/')[2]}", content)


def climbing(target: Path) -> None:
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("model/../data/weights/weight_99", b"x")


def without_weights(target: Path) -> None:
    with zipfile.ZipFile(target) as source:
        contents = {name: source.read(name) for name in source.namelist() if "weights_config" not in name}
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deflated, "weight_99' is compressed"),
        (deflated_graph, r"model\.json' is compressed"),
        (many, "more than the 10000"),
        (overlapping, r"said to have 10\d+ bytes, and the file has 1\d+"),
        (longer_than_the_file, "and the file has|damaged"),
        (absolute, "one folder"),
        (all_above, "one folder"),
        (climbing, "does not need"),
        (without_weights, "damaged"),
    ],
)
def test_a_zip_file_that_is_more_than_its_bytes_is_refused(
    small: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    crafted = tmp_path / "model.pt2"
    shutil.copyfile(small / "model.pt2", crafted)
    change(crafted)
    with pytest.raises(ArchiveError, match=message):
        load_archive(crafted)


def test_a_pickle_of_example_inputs_is_never_read(small: Path, tmp_path: Path) -> None:
    """It could be a deflated bomb in the archive; nothing needs it."""
    crafted = rewritten(
        small / "model.pt2",
        tmp_path / "model.pt2",
        lambda name, content: b"no zip file" if name.endswith("sample_inputs/model.pt") else content,
    )
    check_golden(load_archive(crafted), small)


# --- what the operators would take ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pad, r"cannot take 4 images \(3, 28, 28\): OverrunError: conv2d would hold .* bytes, more than 5\.\de\+08"),
        (lambda p: nodes(p)[3].update(target="torch.ops.aten.nonzero.default"), "cannot take 4 images"),
    ],
)
def test_a_graph_that_takes_more_than_an_encoder_does_not_start(
    small: Path, tmp_path: Path, change: Change, message: str
) -> None:
    loaded = load_archive(rewritten(small / "model.pt2", tmp_path / "model.pt2", with_json(GRAPH, change)))
    with pytest.raises(ArchiveError, match=message):
        check_golden(loaded, small)


def terabytes(graph: fx.Graph, images: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.ones.default, ([2**40],))


def many_live(graph: fx.Graph, images: fx.Node) -> fx.Node:
    parts = [graph.call_function(torch.ops.aten.ones.default, ([1 << 20],)) for _ in range(200)]
    return graph.call_function(torch.ops.aten.cat.default, (parts,))


def days_of_products(graph: fx.Graph, images: fx.Node) -> fx.Node:
    square = graph.call_function(torch.ops.aten.ones.default, ([4096, 4096],))
    for _ in range(300):
        square = graph.call_function(torch.ops.aten.mm.default, (square, square))
    return square


def a_number_without_end(graph: fx.Graph, images: fx.Node) -> fx.Node:
    size = graph.call_function(torch.ops.aten.sym_size.int, (images, 1))
    for _ in range(60):
        size = graph.call_function(operator.mul, (size, size))
    return size


def a_long_list(graph: fx.Graph, images: fx.Node) -> fx.Node:
    return graph.call_function(operator.mul, ([0], 10**6))


def a_long_text(graph: fx.Graph, images: fx.Node) -> fx.Node:
    return graph.call_function(operator.mul, ("a", 10**6))


def rows_behind_an_index(graph: fx.Graph, images: fx.Node) -> fx.Node:
    return graph.call_function(operator.getitem, (images, images))


def a_long_loop(graph: fx.Graph, images: fx.Node) -> fx.Node:
    """A recurrent network that takes 10**6 steps."""
    steps, state, weight = (
        graph.call_function(torch.ops.aten.ones.default, (shape,)) for shape in ([10**6, 1, 1], [1, 1, 1], [1, 1])
    )
    options = (False, 1, 0.0, False, False, False)
    return graph.call_function(torch.ops.aten.rnn_tanh.input, (steps, state, [weight, weight], *options))


def many_parts(target: Any, *arguments: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    """Cuts a tensor into 10**6."""

    def build(graph: fx.Graph, images: fx.Node) -> fx.Node:
        return graph.call_function(target, (graph.call_function(torch.ops.aten.ones.default, ([10**6],)), *arguments))

    return build


def a_number_of_an_image(graph: fx.Graph, images: fx.Node) -> fx.Node:
    total = graph.call_function(torch.ops.aten.sum.default, (images,))
    return graph.call_function(torch.ops.aten.item.default, (total,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (terabytes, "ones_default would hold"),
        (many_live, "ones_default_32 would hold"),
        (days_of_products, "FLOP an image"),
        (a_number_without_end, "a size of 102 bits"),
        (a_long_list, "mul of immutable_list, int"),
        (a_long_text, "mul of str, int"),
        (rows_behind_an_index, "getitem of FakeTensor, FakeTensor"),
        (a_long_loop, "more than 20000 operators"),
        (many_parts(torch.ops.aten.unbind.int), "unbind.int would be one of more than 20000"),
        (many_parts(torch.ops.aten.split.Tensor, 10), "split.Tensor would be one of more"),
        (many_parts(torch.ops.aten.split_with_sizes.default, [1] * 30_000), "split_with_sizes.default would be"),
        (many_parts(torch.ops.aten.chunk.default, 10**6), "split.Tensor would be one of more"),
        (many_parts(torch.ops.aten.tensor_split.sections, 10**6), "gives any number of tensors"),
        (a_number_of_an_image, "DataDependent|_local_scalar_dense"),
    ],
)
def test_a_rehearsal_allocates_nothing_and_names_what_would(
    build: Callable[[fx.Graph, fx.Node], fx.Node], message: str
) -> None:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("images")))
    with pytest.raises(Exception, match=message) as raised:
        rehearse(fx.GraphModule(torch.nn.Module(), graph), torch.zeros(1, 3, 8, 8))
    assert build is a_number_of_an_image or raised.type is OverrunError


# --- at random --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "count"), [(0, 30), pytest.param(1, 3000, marks=pytest.mark.heavy)])
def test_any_damage_ends_in_one_of_two_errors_or_in_the_golden_embedding(small: Path, seed: int, count: int) -> None:
    """In a process that ends at 1 GiB more than a good load takes, or after 20 s with one file."""
    command = [sys.executable, "-m", "tests.strangers.mutated_archives", str(small), str(seed), str(count)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    came = [line.split("\t")[0] for line in process.stdout.splitlines()]
    assert len(came) == count
    assert {"ArchiveError", "golden"} <= set(came) <= {"ArchiveError", "ExportError", "golden"}
    assert came.count("golden") < count / 2


def test_the_same_seed_damages_in_the_same_way(small: Path, tmp_path: Path) -> None:
    """So that a file on which the test above fails can be made again."""
    target = tmp_path / "model.pt2"
    first = [mutated(small / "model.pt2", target, dice) for dice in [random.Random(3)] for _ in range(20)]
    assert first == [mutated(small / "model.pt2", target, dice) for dice in [random.Random(3)] for _ in range(20)]
    assert len(set(first)) > 15


# --- the files beside model.pt2 ---------------------------------------------------------------------------------------


def header(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90 << 20) + b"{",
        header("[" * 50_000),
        header('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"abcd"),
        header('{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}', b"abcd"),
        header(
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            b"abcd",
        ),
    ],
)
def test_weights_whose_header_lies_are_an_export_error(small: Path, tmp_path: Path, content: bytes) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged: SafetensorError"):
        check_bundle(with_digests(copy))


def npz(path: Path, compressed: bool = False, **arrays: Any) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            if isinstance(array, bytes):
                archive.writestr(f"{name}.npy", array)
            else:
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, array)


def npy(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


IMAGES, EMBEDDINGS = np.zeros((2, 3, 28, 28), np.uint8), np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": npy("(1048576, 1048576)"), "embeddings": EMBEDDINGS}, "damaged: ValueError"),
        ({"images": npy("(-1, 3)"), "embeddings": EMBEDDINGS}, "damaged"),
        ({"images": npy("(1, 3, 28, 28)", "|O"), "embeddings": EMBEDDINGS}, "damaged: ValueError"),
        ({"images": b"\x93NUMPY\x03\x00", "embeddings": EMBEDDINGS}, "another version"),
        ({"images": b"PK", "embeddings": EMBEDDINGS}, "damaged: ValueError"),
        ({"images": IMAGES}, "damaged: KeyError"),
        ({"images": IMAGES, "embeddings": EMBEDDINGS, "compressed": True}, "is compressed"),
        ({"images": IMAGES[:0], "embeddings": EMBEDDINGS[:0]}, r"images uint8 \(0, 3, 28, 28\)"),
        ({"images": IMAGES, "embeddings": EMBEDDINGS[:1]}, r"float32 \(1, 8\), not"),
        ({"images": IMAGES.astype(np.float32), "embeddings": EMBEDDINGS}, "images float32"),
        ({"images": IMAGES[0], "embeddings": EMBEDDINGS}, "not uint8"),
    ],
)
def test_golden_embeddings_that_are_none_are_an_export_error(
    small: Path, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    npz(copy / "golden.npz", **arrays)
    with pytest.raises(ExportError, match=rf"golden\.npz is damaged.*{message}|golden\.npz is {message}"):
        check_golden(lambda images: torch.zeros(len(images), 8), copy)
    with pytest.raises(ExportError, match=r"golden\.npz is damaged"):
        check_bundle(with_digests(copy))


def pretrained(**changes: Any) -> Change:
    return lambda config: config["pretrained_cfg"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("pretrained_cfg"),
        lambda config: config.update(pretrained_cfg=[]),
        lambda config: config.update(stem="torch.os"),
        lambda config: config.update(stem="x" * (5 << 20)),
        pretrained(input_size=[3, 28]),
        pretrained(input_size=[3, -1, -1]),
        pretrained(input_size="3"),
        pretrained(mean=[0.5, 0.5]),
        pretrained(mean=[0.5, 0.5, float("nan")]),
        pretrained(std=[0.5, 0.5, 0]),
        pretrained(std=None),
    ],
)
def test_a_config_that_is_none_is_an_export_error(small: Path, tmp_path: Path, change: Change) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"config\.json is damaged"):
        check_golden(lambda images: torch.zeros(len(images), 8), copy)
    with pytest.raises(ExportError, match=r"config\.json is damaged"):
        check_bundle(with_digests(copy))


def test_a_size_that_the_golden_images_do_not_have_is_an_export_error(small: Path, tmp_path: Path) -> None:
    """Whoever embeds by it would resize every image to it."""
    copy = shutil.copytree(small, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 100_000, 100_000]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"says 100000 px, and the golden images are \(4, 3, 28, 28\)"):
        check_golden(lambda images: torch.zeros(len(images), 8), copy)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"card": {}}', "null", '{"card": 1' + "0" * (5 << 20) + "}"])
def test_a_card_that_is_none_is_an_export_error(small: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(small, tmp_path / "copy")
    (copy / "card.json").write_text(text)
    with pytest.raises(ExportError, match=r"card\.json is damaged"):
        check_bundle(copy)


def test_an_encoder_that_fails_on_its_golden_images_is_an_export_error(small: Path) -> None:
    def fails(images: torch.Tensor) -> torch.Tensor:
        return images @ torch.zeros(5, 5)

    with pytest.raises(ExportError, match=r"cannot encode its golden images \(4, 3, 28, 28\): RuntimeError"):
        check_golden(fails, small)
