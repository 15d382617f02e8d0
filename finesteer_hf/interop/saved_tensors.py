"""Reads files of `torch.save` without an unpickler: strings, numbers, lists, dicts and plain tensors only.

A pickle is a program. This runs the few instructions that plain data needs and calls nothing that a file names; sizes
are checked before anything is read or allocated.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop.vectors import MOST_BYTES, WIDEST


MOST_ENTRIES = 20_000
MOST_PICKLE_BYTES = 4 * 1024 * 1024
MOST_INSTRUCTIONS = 1_000_000
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_TENSOR, _PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"
_VALUES = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


def read_saved_tensors(path: Path) -> Any:
    """Read a file of `torch.save` that holds plain data.

    Args:
        path: the file, in the zip format that torch writes since version 1.6.

    Returns:
        Strings, numbers, lists, tuples, dicts with string keys, and dense tensors in them.

    Raises:
        AdapterFileError: if it is damaged, holds anything else, or asks for more memory than `MOST_BYTES`.
    """
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive, path.name).read()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise AdapterFileError(
            f"{path.name} is not a torch.save file in the current format ({error}); older formats are pickles."
        ) from error
    except (ValueError, TypeError, LookupError, OverflowError, RuntimeError, RecursionError, AttributeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path.name} holds more than plain tensors, or is damaged: {error}") from error


def _check_directory(path: Path) -> None:
    """Refuse an archive with too many entries, before a record of each is built."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 22))
        end = file.read()
    if len(end) < 22 or end[:4] != b"PK\5\6":
        raise zipfile.BadZipFile("it does not end as a zip file")
    entries = struct.unpack("<H", end[10:12])[0]
    size = struct.unpack("<L", end[12:16])[0]
    if entries > MOST_ENTRIES or size > MOST_ENTRIES * 200:
        raise zipfile.BadZipFile(f"it has {entries} entries in {size} bytes of directory")


@dataclass(frozen=True)
class _Global:
    """A name that a pickle would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A flat array of numbers."""

    values: torch.Tensor


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self.archive, self.name = archive, name
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [entry for entry in self.entries if entry.endswith("/data.pkl")]
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if len(self.entries) != len(archive.infolist()) or len(pickles) != 1:
            raise zipfile.BadZipFile("it needs exactly one data.pkl and no entry twice")
        if unpacked > MOST_BYTES or any(entry.file_size != entry.compress_size for entry in archive.infolist()):
            raise AdapterFileError(f"{name} would unpack to {unpacked} bytes; torch.save does not compress.")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, _Storage] = {}
        self.left = MOST_BYTES
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Run the instructions that plain data needs."""
        size = self.entries[f"{self.folder}data.pkl"].file_size
        if size > MOST_PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {size} bytes; at most {MOST_PICKLE_BYTES} are read")
        content = self.archive.read(f"{self.folder}data.pkl")
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST_INSTRUCTIONS:
                raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.run(opcode.name, argument)
        raise ValueError("it has no end")

    def run(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "PROTO":
            pass
        elif name in _VALUES:
            stack.append(_VALUES[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _PUTS:
            self.memo[argument] = stack[-1]
        elif name in _GETS:
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack.append(tuple(self.pop(count)))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.marked()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self.pop(2) if name == "SETITEM" else self.marked()
            self.set_items(self.top(dict), pairs)
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "BINPERSID":
            stack.append(self.storage(*self.pop(1)))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            stack.append(self.made(function, arguments))
        else:
            raise ValueError(f"plain tensors do not need the instruction {name}")

    def pop(self, count: int) -> list[Any]:
        """Pop the newest values."""
        if len(self.stack) < count + (self.marks[-1] if self.marks else 0):
            raise ValueError("it pops more values than there are")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def marked(self) -> list[Any]:
        """Pop everything since the last mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"found a {type(self.stack[-1]).__name__} instead of a {kind.__name__}")
        return self.stack[-1]

    @staticmethod
    def set_items(target: dict[Any, Any], pairs: list[Any]) -> None:
        keys = pairs[::2]
        # Other keys may nest each other many times over, and hashing them takes forever.
        if not all(type(key) in (str, int) for key in keys):
            raise ValueError("a key is neither a string nor an integer")
        target.update(zip(keys, pairs[1::2], strict=True))

    def storage(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        name = dtype.name.removeprefix("torch ") if isinstance(dtype, _Global) else ""
        if kind != "storage" or name not in _STORAGES or type(key) is not str or type(count) is not int:
            raise ValueError(f"{name or 'it'} is not a supported number type")
        if key not in self.storages:
            values = self.archive.read(self.entries[f"{self.folder}data/{key}"])
            numbers = torch.frombuffer(bytearray(values), dtype=_STORAGES[name]) if values else torch.empty(0)
            self.storages[key] = _Storage(numbers)
        return self.storages[key]

    def made(self, function: Any, arguments: Any) -> Any:
        """The result of one of the three functions that plain tensors are saved with."""
        name = function.name if isinstance(function, _Global) else type(function).__name__
        if name == _ORDERED and arguments == ():
            return OrderedDict()
        if name == _PARAMETER and isinstance(arguments[0], torch.Tensor):
            return arguments[0]
        if name != _TENSOR:
            raise ValueError(f"{name!r} is not part of a plain tensor")
        storage, offset, size, stride = arguments[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor has no numbers")
        if not size or not all(type(axis) is int and axis >= 0 for axis in (offset, *size, *stride)):
            raise ValueError("a tensor has no shape")
        numbers = math.prod(size)
        if len(size) > 8 or not 0 < numbers <= WIDEST:
            raise AdapterFileError(f"{self.name} has a tensor of shape {tuple(size)}, which is not a steering vector.")
        self.left -= numbers * storage.values.element_size()
        if self.left < 0:
            raise AdapterFileError(f"{self.name} holds more than {MOST_BYTES} bytes of tensors.")
        return torch.as_strided(storage.values, size, stride, offset)
