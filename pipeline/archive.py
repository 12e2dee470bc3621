"""``model.pt2`` (torch.export): loaded only after everything in it was found to be tensors and tensor arithmetic.

``torch.export.load`` is not safe on its own. Besides unpickling, it evaluates strings of the graph's JSON as
Python: symbolic sizes (``sympy.sympify`` is ``eval``) and input guards. MLflow's
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false refuses the pickles and lets those strings through (torch 2.15,
mlflow 3.17: tests/test_archive.py has the files that prove it). Here everything is refused that is not known
to be harmless, so what a later torch adds stays out until somebody has looked at it.
"""

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass

from pipeline.errors import UserError

_TEXT_RECORDS = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id", "version"}
_GRAPH_RECORD = "models/model.json"
_SAMPLE_INPUTS_RECORD = "data/sample_inputs/model.pt"
_CONFIG_RECORDS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSOR_RECORD = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_TENSOR_PATH = re.compile(r"(weight|tensor)_\d+")

_ATEN_TARGET = re.compile(r"torch\.ops\.aten\.(?!__)(?!from_file\b)(\w+)\.(?!__)(\w+)")  # from_file reads the disk
_SCALAR_TARGETS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|getitem)"
    r"|torch\.sym_(float|int|max|min|not|sqrt|ite)"
)
_SIZE_FUNCTIONS = re.compile(
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|Mod|PythonMod"
    "|ModularIndexing|PowByNatural|ToFloat|TruncToInt|FloorToInt|CeilToInt|Identity|Equality|Unequality|GreaterThan"
    "|LessThan|StrictGreaterThan|StrictLessThan"
)
_SIZE_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub)
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


class ArchiveError(UserError):
    """A ``model.pt2`` is damaged, or holds something that could run code; the message names the part."""


def load_archive(source: Path | bytes, device: torch.device | None = None) -> nn.Module:
    """The encoder in a ``model.pt2``: maps float32 (N, 3, H, W), normalised, to (N, D). ArchiveError if refused."""
    checked = _checked_copy(source)
    program = torch.export.load(checked)
    if device is not None and device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


def _checked_copy(source: Path | bytes) -> io.BytesIO:
    """The archive rewritten from the records that were checked.

    torch reads zip files with another parser than Python does. What torch gets is therefore written anew,
    so that no record can look different to it.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            roots = {name.split("/", 1)[0] for name in names}
            if len(roots) != 1 or len(set(names)) != len(names):
                raise ArchiveError(f"model.pt2 must hold one folder without duplicate records, not {sorted(roots)}")
            with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as rewritten:
                for name in names:
                    record = name.split("/", 1)[1]
                    rewritten.writestr(f"model/{record}", _checked(record, archive.read(name)))
    except (zipfile.BadZipFile, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArchiveError(f"model.pt2 is damaged: {error}; pull or export it again") from error
    copy.seek(0)
    return copy


def _checked(record: str, content: bytes) -> bytes:
    if record == _GRAPH_RECORD:
        return json.dumps(_checked_graph(json.loads(content))).encode()
    if record in _CONFIG_RECORDS:
        for key, entry in json.loads(content)["config"].items():
            if entry["use_pickle"] is not False or not _TENSOR_PATH.fullmatch(entry["path_name"]):
                raise ArchiveError(f"model.pt2 stores {key!r} as a pickled object; only raw tensors are loaded")
    elif record == _SAMPLE_INPUTS_RECORD:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ArchiveError("the example inputs in model.pt2 are not plain tensors") from error
    elif record in _TEXT_RECORDS:
        if not re.fullmatch(rb"[\w.-]{1,64}\n?", content):
            raise ArchiveError(f"{record!r} in model.pt2 is not the short text it should be")
    elif not _TENSOR_RECORD.fullmatch(record):
        raise ArchiveError(f"model.pt2 holds {record!r}, which an exported encoder does not need")
    return content


def _checked_graph(program: dict[str, Any]) -> dict[str, Any]:
    if program.get("guards_code"):
        raise ArchiveError(f"model.pt2 carries guards, which torch runs as Python: {program['guards_code'][0][:80]!r}")
    for entry in _dicts(program):
        if "expr_str" in entry and not _is_size_expression(entry["expr_str"]):
            raise ArchiveError(f"model.pt2 has a size that is not arithmetic: {entry['expr_str'][:80]!r}")
        for operator in (entry.get("target") if "inputs" in entry else None, entry.get("as_operator")):
            if operator is not None and not _is_tensor_operator(operator):
                raise ArchiveError(f"model.pt2 calls {operator!r}; only operators of aten and scalar arithmetic may")
        for spec in (entry.get("in_spec"), entry.get("out_spec")):
            if spec and not all(node["type"] in _CONTAINERS for node in _dicts(json.loads(spec)) if "type" in node):
                raise ArchiveError("the inputs or outputs in model.pt2 are not tensors in plain containers")
        if "inputs" in entry and "metadata" in entry:
            entry["metadata"] = {}  # names of Python functions and modules, for debugging only
    return program


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts(child)


def _is_size_expression(text: str) -> bool:
    """Whether ``text`` is built from sympy's constructors, sizes' names and numbers alone."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    symbols = {
        id(call.args[0])
        for call in nodes
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Symbol"
        if call.args
        and isinstance(call.args[0], ast.Constant)
        and re.fullmatch(r"[a-z]{1,2}\d+", str(call.args[0].value))
    }
    for node in nodes:
        if not isinstance(node, _SIZE_NODES):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
        if isinstance(node, ast.Name) and not _SIZE_FUNCTIONS.fullmatch(node.id):
            return False
        if isinstance(node, ast.Constant) and not (isinstance(node.value, int | float) or id(node) in symbols):
            return False
    return True


def _is_tensor_operator(target: str) -> bool:
    if _SCALAR_TARGETS.fullmatch(target):
        return True
    match = _ATEN_TARGET.fullmatch(target)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    return isinstance(getattr(packet, match[2], None), torch._ops.OpOverload) if match else False
