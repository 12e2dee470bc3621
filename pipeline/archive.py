"""``model.pt2`` (torch.export): loaded only after everything in it was found to be tensors and tensor arithmetic.

``torch.export.load`` is not safe on its own. Besides unpickling, it evaluates strings of the graph's JSON as
Python: symbolic sizes (``sympy.sympify`` is ``eval``) and input guards. MLflow's
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false refuses the pickles and lets those strings through (torch 2.15,
mlflow 3.17: tests/test_archive.py has the files that prove it). Here everything is refused that is not known
to be harmless, so what a later torch adds stays out until somebody has looked at it.

What a file may cost is bounded too. Records are stored as they are, so none is larger than the file; JSON is limited in
length, depth and numbers; sizes are linear in the input's sizes, for ``9**9**9**9`` is arithmetic as well; tensors lie
within their records; and the operators are rehearsed, see ``rehearsal.py``. The limits are ten times what
twelve encoders of timm have at most.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.passes import move_to_device_pass

from pipeline.errors import UserError
from pipeline.rehearsal import rehearse

_MAX_RECORDS = 10_000  # efficientnet_b0 has 367
_MAX_JSON_BYTES = 8 << 20  # swin_tiny's graph has 0.8 MB; Python needs 25 times as much for it
_MAX_JSON_DEPTH = 32  # levit_128 has 11
_MAX_NODES = 10_000  # of the graph: 5 ms each; swin_tiny has 587
_MAX_SIZES = 20_000  # expressions: 0.2 ms each
_MAX_SYMBOLS = 16
_MAX_DIMS = 16  # swin_tiny has 6; with 200,000 torch loads for a minute
_INT64 = range(-(2**63), 2**63)

_TEXT_RECORDS = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id", "version"}
_GRAPH_RECORD = "models/model.json"
_SAMPLE_INPUTS_RECORD = "data/sample_inputs/model.pt"
_CONFIG_RECORDS = {  # -> where the tensors lie that they list
    "data/weights/model_weights_config.json": "data/weights/",
    "data/constants/model_constants_config.json": "data/constants/",
}
_TENSOR_RECORD = re.compile(r"data/(weights/weight|constants/tensor)_\d+")

# from_file reads the disk; _sparse_coo_tensor_unsafe takes indices at their word, and to_dense writes where they point.
_ATEN_TARGET = re.compile(r"torch\.ops\.aten\.(?!__|from_file\b|\w*(?:sparse|unsafe))(\w+)\.(?!__)(\w+)")
_SCALAR_TARGETS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|getitem)"  # pow: 9**9**9**9
    r"|torch\.sym_(float|int|max|min|not|sqrt|ite)"
)
_SYMBOL = re.compile(r"s\d{1,6}")
_LINEAR_FUNCTIONS = {"Add", "Equality", "Unequality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"}
_MAX_SIZE_CHARS = 300
_PLAIN_TEXT = re.compile(r"[\w.,:>+ -]{0,1000}")  # names, versions, "bnd,bmd->bnm": no brackets, quotes or "="
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


class ArchiveError(UserError):
    """A ``model.pt2`` is damaged, could run code, or would take too much; the message names the part."""


def load_archive(source: Path | bytes, device: torch.device | None = None) -> nn.Module:
    """The encoder in a ``model.pt2``: maps float32 (N, 3, H, W), normalised, to (N, D). ArchiveError if refused.

    ArchiveError from the encoder itself where a batch would cost more than an encoder's may.
    """
    try:
        checked = _checked_copy(source)
        program = torch.export.load(checked)
        if device is not None and device.type != "cpu":
            program = move_to_device_pass(program, device)
        return _Rehearsed(program.module())
    except ArchiveError:
        raise
    except Exception as error:  # what zipfile, json and torch stumble over in a damaged file has any type
        raise ArchiveError(f"model.pt2 is damaged: {first_line(error)}; pull or export it again") from error


class _Rehearsed(nn.Module):
    """Rehearses a batch that is larger than all before it: a smaller one costs an encoder less."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__()
        self._program = program
        self._rehearsed: dict[torch.Size, int] = {}  # shape of an image -> N

    def forward(self, images: Tensor) -> Tensor:
        count, shape = len(images), images.shape[1:]
        if count > self._rehearsed.get(shape, 0):
            try:
                rehearse(self._program, images)
            except Exception as error:  # as above
                raise ArchiveError(
                    f"the encoder in model.pt2 cannot take {count} images {tuple(shape)}: {first_line(error)}"
                ) from error
            self._rehearsed[shape] = count
        embeddings: Tensor = self._program(images)
        return embeddings


def first_line(error: Exception) -> str:
    """The type of a foreign exception, and how its message begins."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def _checked_copy(source: Path | bytes) -> io.BytesIO:
    """The archive rewritten from the records that were checked.

    torch reads zip files with another parser than Python does. What torch gets is therefore written anew,
    so that no record can look different to it.
    """
    copy = io.BytesIO()
    file_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
    with (
        zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive,
        zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as rewritten,
    ):
        check_stored(archive, file_bytes)
        sizes = _record_sizes(archive.infolist())
        for entry in archive.infolist():
            record = entry.filename.partition("/")[2]
            rewritten.writestr(f"model/{record}", _checked(record, archive.read(entry), sizes))
    copy.seek(0)
    return copy


def check_stored(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """ArchiveError if reading the records could take more memory than the file has bytes."""
    entries = archive.infolist()
    if len(entries) > _MAX_RECORDS:
        raise ArchiveError(f"{len(entries)} records are more than the {_MAX_RECORDS} that are read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ArchiveError(f"{entry.filename[:80]!r} is compressed, which no encoder's records are")
    if (records_bytes := sum(entry.file_size for entry in entries)) > file_bytes:
        raise ArchiveError(f"the records are said to have {records_bytes} bytes, and the file has {file_bytes}")


def _record_sizes(entries: list[zipfile.ZipInfo]) -> dict[str, int]:
    """Record -> bytes. ArchiveError unless they lie in one folder, each once."""
    roots = {entry.filename.partition("/")[0] for entry in entries}
    sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if len(roots) != 1 or roots & {"", ".", ".."} or len(sizes) != len(entries):
        raise ArchiveError(f"model.pt2 must hold one folder without duplicate records, not {sorted(roots)[:10]}")
    return sizes


def _checked(record: str, content: bytes, sizes: Mapping[str, int]) -> bytes:
    """What torch gets of a record."""
    if record == _GRAPH_RECORD:
        return json.dumps(_checked_graph(_read_json(record, content))).encode()
    if record in _CONFIG_RECORDS:
        return json.dumps(_checked_tensors(_CONFIG_RECORDS[record], _read_json(record, content), sizes)).encode()
    if record == _SAMPLE_INPUTS_RECORD:
        return b""  # a pickle, which nothing needs
    if record in _TEXT_RECORDS:
        if not re.fullmatch(rb"[\w.-]{1,64}\n?", content):
            raise ArchiveError(f"{record!r} in model.pt2 is not the short text it should be")
    elif not _TENSOR_RECORD.fullmatch(record):
        raise ArchiveError(f"model.pt2 holds {record[:80]!r}, which an exported encoder does not need")
    return content


def _read_json(record: str, content: bytes) -> Any:
    if len(content) > _MAX_JSON_BYTES:
        raise ArchiveError(f"{record!r} in model.pt2 has {len(content)} bytes, at most {_MAX_JSON_BYTES} are read")
    return json.loads(content)


def _checked_tensors(folder: str, payload: Any, sizes: Mapping[str, int]) -> Any:
    """The list of tensors, each within its record."""
    for key, entry in _entries(payload):
        _check_plain(key, entry)
    for key, entry in payload["config"].items():
        record = f"{folder}{entry['path_name']}"
        if entry["use_pickle"] is not False or not _TENSOR_RECORD.fullmatch(record):
            raise ArchiveError(f"model.pt2 stores {key[:80]!r} as a pickled object; only raw tensors are loaded")
        numbers = prod(size["as_int"] for size in entry["tensor_meta"]["sizes"])
        if not 0 <= numbers <= sizes[record]:
            raise ArchiveError(f"{key[:80]!r} in model.pt2 has {numbers} numbers, its record {sizes[record]} bytes")
    return payload


def _checked_graph(program: Any) -> Any:
    """The program without the names of Python functions and modules, which are for debugging only."""
    if program["guards_code"]:
        raise ArchiveError(f"model.pt2 carries guards, which torch runs as Python: {str(program['guards_code'])[:80]}")
    if len(nodes := program["graph_module"]["graph"]["nodes"]) > _MAX_NODES:
        raise ArchiveError(f"the graph in model.pt2 has {len(nodes)} operators, at most {_MAX_NODES} are loaded")
    if len(ranges := program["range_constraints"]) > _MAX_SYMBOLS or not all(map(_SYMBOL.fullmatch, ranges)):
        raise ArchiveError(f"model.pt2 has the sizes {str(list(ranges))[:80]}, not at most {_MAX_SYMBOLS} such as s77")
    num_sizes = 0
    for key, value in _entries(program):
        if isinstance(value, dict) and "inputs" in value:
            value["metadata"] = {}
        if key == "expr_str":
            num_sizes += 1
            if num_sizes > _MAX_SIZES or not _is_linear(value):
                raise ArchiveError(
                    f"model.pt2 has a size that is not linear in the input's sizes, or more than {_MAX_SIZES} sizes: "
                    f"{str(value)[:80]!r}"
                )
        elif key in ("target", "as_operator"):
            if not _is_tensor_operator(value):
                raise ArchiveError(
                    f"model.pt2 calls {str(value)[:80]!r}; only operators of aten and scalar arithmetic may be called"
                )
        elif key in ("in_spec", "out_spec"):
            if value:
                _check_containers(value)
        else:
            _check_plain(key, value)
    return program


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a JSON with its key, from the top down; a list's items have the list's key."""
    level = [("", document)]
    for _ in range(_MAX_JSON_DEPTH):
        yield from level
        level = [
            child
            for key, value in level
            if isinstance(value, dict | list)
            for child in (value.items() if isinstance(value, dict) else ((key, item) for item in value))
        ]
        if not level:
            return
    raise ArchiveError(f"the JSON in model.pt2 is nested more than {_MAX_JSON_DEPTH} deep")


def _check_plain(key: str, value: Any) -> None:
    for text in (key, value):
        if isinstance(text, str) and not _PLAIN_TEXT.fullmatch(text):
            raise ArchiveError(f"model.pt2 holds {text[:80]!r}, where a name or a number should be")
    if key in ("sizes", "strides") and isinstance(value, list) and len(value) > _MAX_DIMS:
        raise ArchiveError(f"a tensor in model.pt2 has {len(value)} dimensions, at most {_MAX_DIMS} are loaded")
    if isinstance(value, int) and value not in _INT64:
        raise ArchiveError(f"a number in model.pt2 has {value.bit_length()} bits, more than 64")


def _check_containers(spec: str) -> None:
    for key, value in _entries(json.loads(spec)):
        if (key == "type" and value not in _CONTAINERS) or (key == "context" and value not in (None, "null", "[]")):
            raise ArchiveError("the inputs or outputs in model.pt2 are not tensors in plain containers")


def _is_linear(text: Any) -> bool:
    """Whether ``text`` is a number, a size's symbol, or the sum, multiple, whole quotient or comparison of such, built
    by sympy's constructors.

    All that encoders have is "Mul(Integer(49), Symbol('s77', positive=True, integer=True))". Products of symbols would
    cost sympy minutes at a few hundred characters, powers for ever.
    """
    if not isinstance(text, str) or len(text) > _MAX_SIZE_CHARS:
        return False
    try:
        return _degree(ast.parse(text, mode="eval").body) <= 1
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _degree(node: ast.AST) -> int:
    """0 of a number, 1 of what is linear in the symbols, else more. ValueError for what is no size."""
    match node:
        case ast.Constant(value=int(number)) if number in _INT64:
            return 0
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))) if -number in _INT64:
            return 0
        case ast.Call(func=ast.Name("Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            if _SYMBOL.fullmatch(name) and all(
                isinstance(each.value, ast.Constant) and isinstance(each.value.value, bool) for each in assumptions
            ):
                return 1
        case ast.Call(func=ast.Name("Integer"), args=[number], keywords=[]) if _degree(number) == 0:
            return 0
        case ast.Call(func=ast.Name("Mul"), args=factors, keywords=[]):
            return sum(map(_degree, factors))
        case ast.Call(func=ast.Name("FloorDiv"), args=[dividend, divisor], keywords=[]) if _degree(divisor) == 0:
            return _degree(dividend)
        case ast.Call(func=ast.Name(function), args=[_, *_] as terms, keywords=[]) if function in _LINEAR_FUNCTIONS:
            return max(map(_degree, terms))
    raise ValueError(ast.dump(node))


def _is_tensor_operator(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    if _SCALAR_TARGETS.fullmatch(target):
        return True
    match = _ATEN_TARGET.fullmatch(target)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    return isinstance(getattr(packet, match[2], None), torch._ops.OpOverload) if match else False
