"""Files of torch.save made to do harm: what is no plain tensor is not made."""

from __future__ import annotations

import json
import resource
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hostile_files import safetensors

from finesteer_hf.errors import AdapterFileError
from finesteer_hf.interop import load_vectors
from finesteer_hf.interop.saved_tensors import read_saved_tensors


def saved(path: Path, pickled: bytes, entries: int = 0, **more: bytes) -> Path:
    """A file as torch.save writes them, around any data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
        for number in range(entries):
            archive.writestr(f"archive/data/{number}", b"")
    return path


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


DOUBLED = b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(40))
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
NUMBERS = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02}" + DOUBLED + b"Ns.", "a key is neither a string nor an integer"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\xf9\x02\x95\0\x85R.", "'builtins bytearray' is not part"),
        (b"\x80\x02ctorch\nSize\n" + DOUBLED + b"\x85R.", "'torch Size' is not part"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.", "is not part of a plain tensor"),
        (b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.", "'os system' is not part"),
        (b"\x80\x02cposix\nsystem\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02}}b.", "the instruction BUILD"),
        (b"\x80\x04\x95" + bytes(8) + b".", "the instruction FRAME"),
        (b"\x80\x02" + b"]" * 1_100_000 + b".", "more than 1000000 instructions"),
        (b"\x80\x02" + b"(" * 1_000 + b".", "damaged"),
        (b"\x80\x02Q.", "more values than there are"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02K\x01Q.", "damaged"),
        (b"\x80\x02" + TENSOR + b"(" + NUMBERS + b"K\0J\0\0\0\x7f\x85K\0\x85\x89NtR.", "of shape"),
        (b"\x80\x02" + TENSOR + b"(" + NUMBERS + b"K\0K\x05\x85K\x01\x85\x89NtR.", "damaged"),
        (b"\x80\x02" + TENSOR + b"(" + NUMBERS + b"K\0K\x04\x85J\xff\xff\xff\xff\x85\x89NtR.", "no shape"),
        (b"\x80\x02" + TENSOR + b"(NK\0K\x04\x85K\x01\x85\x89NtR.", "has no numbers"),
        (b"\x80\x02" + text("layers.1") * 3 + b"t.", "damaged"),
    ],
)
def test_what_is_no_plain_tensor_is_not_made(tmp_path: Path, pickled: bytes, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterFileError, match=message):
        load_vectors(saved(tmp_path / "v.pt", pickled, **{"data/0": bytes(16)}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 * 1024


def test_archives_that_are_not_what_torch_writes_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "many.pt", b"\x80\x02}.", entries=21_000)
    with pytest.raises(AdapterFileError, match="21002 entries"):
        load_vectors(path)
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    with pytest.raises(AdapterFileError, match="would unpack to 104857600 bytes"):
        load_vectors(tmp_path / "packed.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(AdapterFileError, match="no entry twice"):
        load_vectors(tmp_path / "twice.pt")
    (tmp_path / "more.pt").write_bytes(saved(tmp_path / "one.pt", b"\x80\x02}.").read_bytes() + b"x" * 100)
    with pytest.raises(AdapterFileError, match="does not end as a zip file"):
        load_vectors(tmp_path / "more.pt")


def test_files_of_more_bytes_than_vectors_have_are_not_read(tmp_path: Path) -> None:
    for name in ("v.pt", "v.gguf", "v.svec", "v.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(AdapterFileError, match="at most 268435456 are read"):
            load_vectors(tmp_path / name)


def test_shapes_are_looked_at_before_anything_is_read(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = {"__metadata__": {"cfg": json.dumps({"method": "mean_diff", "coeff": 1.0})}}
    for shape in ([0, 1 << 30], [1 << 30, 0], [0]):
        header = {**config, "layer1.v": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        (tmp_path / "v.safetensors").write_bytes(safetensors(header))
        with pytest.raises(AdapterFileError, match="which is not a steering vector"):
            load_vectors(tmp_path / "v.safetensors")
    # Tensors that all lie on the same numbers, as gguf's own writer would never lay them.
    numbers, count = 1 << 18, 300
    header = b"GGUF" + struct.pack("<IQQ", 3, count, 1)
    header += struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 13) + b"controlvector"
    for layer in range(count):
        name = f"direction.{layer + 1}".encode()
        header += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, numbers, 0, 0)
    header += bytes(-len(header) % 32)
    (tmp_path / "v.gguf").write_bytes(header + bytes(4 * numbers))
    with pytest.raises(AdapterFileError, match=r"at most 268435456|its tensors overlap"):
        load_vectors(tmp_path / "v.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    # A value that holds a list of lists of lists.
    deep = b"".join(struct.pack("<IQ", 9, 1) for _ in range(3000))
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + deep
    (tmp_path / "deep.gguf").write_bytes(header)
    with pytest.raises(AdapterFileError, match="damaged"):
        load_vectors(tmp_path / "deep.gguf")
    (tmp_path / "lists.svec").write_text('{"directions": {"1": [' + "[]," * 300_000 + "[]]}}")
    with pytest.raises(AdapterFileError, match="lists and objects"):
        load_vectors(tmp_path / "lists.svec")


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "views": [base[1], base[:, 2], base.T, base[::2, 1:3]],
        "dtypes": {str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
        "others": (torch.arange(3), torch.tensor([True, False]), torch.nn.Parameter(torch.ones(2))),
        "plain": {"text": "ä", "number": 2**40, "half": 0.5, "none": None, "yes": True, 3: [], "empty": ()},
    }
    torch.save(content, tmp_path / "v.pt")
    ours, theirs = read_saved_tensors(tmp_path / "v.pt"), torch.load(tmp_path / "v.pt", weights_only=True)
    assert ours["plain"] == theirs["plain"] and list(ours["dtypes"]) == list(theirs["dtypes"])
    for name in ("views", "others"):
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(ours[name], theirs[name], strict=True))
    assert all(torch.equal(ours["dtypes"][name], theirs["dtypes"][name]) for name in ours["dtypes"])
