"""Safetensors files: written where asked, read back, and refused in one sentence where they are none."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunepath.checkpoint.tensor_file import NewTensor, TensorFile, write_tensor_file
from prunepath.errors import CheckpointError


def test_written_tensors_begin_where_asked_and_read_back(tmp_path):
    tensors = {
        "a": torch.arange(5, dtype=torch.float16),
        "b": torch.randn(3, 7).bfloat16(),
        "c": torch.randn(2, 2, 2),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(3.0),
    }
    for align in (8, 64, 4096):
        path = tmp_path / f"{align}.safetensors"
        new = {k: NewTensor.computed(t.dtype, t.shape, lambda t=t: t) for k, t in tensors.items()}
        write_tensor_file(path, new, {"format": "pt"}, align=align)
        file, again = TensorFile(path), load_file(path)
        assert file.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.tensor(name), tensor) and torch.equal(again[name], tensor)
            assert file.entries[name].begin % align == 0


def test_a_write_to_a_mapped_tensor_stays_in_memory_and_never_reaches_the_file(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "file.safetensors")
    file = TensorFile(tmp_path / "file.safetensors")
    file.tensor("a").fill_(1.0)
    assert torch.equal(file.tensor("a"), torch.ones(4))
    assert torch.equal(TensorFile(tmp_path / "file.safetensors").tensor("a"), torch.zeros(4))
    file.release()
    assert torch.equal(file.tensor("a"), torch.zeros(4)), "released pages are the file's again"


def test_a_tensor_that_is_not_there_or_of_another_kind_is_named(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.int8), "b": torch.zeros(2, 3)}, tmp_path / "file.safetensors")
    file = TensorFile(tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="to hold c, but it does not"):
        file.tensor("c")
    with pytest.raises(CheckpointError, match=r"a in .* to be float32, bfloat16, float16 or uint8, got I8"):
        file.tensor("a")
    with pytest.raises(CheckpointError, match=r"b of shape \[3, 2\] in .*, got \[2, 3\]"):
        file.require("b", [3, 2])


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HUGE = 10**400
HOSTILE = {
    "null": None,
    "list": [],
    "number": 3,
    "null entry": {"a": None},
    "text entry": {"a": "F32"},
    "nested entry": {"a": {"b": entry()}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "null dtype": {"a": entry(dtype=None)},
    "unknown dtype": {"a": entry(dtype="F33")},
    "negative shape": {"a": entry(shape=(-4,))},
    "fractional shape": {"a": entry(shape=(4.5,))},
    "text shape": {"a": entry(shape=("4",))},
    "nested shape": {"a": entry(shape=([4],))},
    "huge shape": {"a": entry(shape=(HUGE,))},
    "overflowing shape": {"a": entry(shape=(1 << 33, 1 << 33))},
    "negative offset": {"a": entry(begin=-16, end=0)},
    "fractional offset": {"a": entry(end=16.5)},
    "huge offset": {"a": entry(end=HUGE)},
    "backward offsets": {"a": entry(begin=16, end=0)},
    "three offsets": {"a": {**entry(), "data_offsets": [0, 8, 16]}},
    "beyond the file": {"a": entry(end=1600, shape=(400,))},
    "overlap": {"a": entry(), "b": entry(begin=8, end=24)},
    "twice": {"a": entry(), "b": entry()},
    "hole": {"a": entry(begin=16, end=32)},
    "another size": {"a": entry(shape=(3,))},
    "metadata is a list": {"__metadata__": [], "a": entry()},
    "metadata is nested": {"__metadata__": {"format": {"pt": 1}}, "a": entry()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_sentence(name, tmp_path):
    path = tmp_path / "file.safetensors"
    header = json.dumps(HOSTILE[name]).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"file\.safetensors to be a whole safetensors file, but: ") as error:
        TensorFile(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<q", -1) + b"{}",
        struct.pack("<Q", 9) + b'{"a": nul',
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 4) + b"\xff\xfe{}",
    ],
)
def test_what_is_no_safetensors_file_is_one_sentence(content, tmp_path):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.safetensors to be a whole safetensors file"):
        TensorFile(tmp_path / "file.safetensors")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for name in ("missing.safetensors", ""):
        with pytest.raises(CheckpointError, match=r"Expected .*safetensors file"):
            TensorFile(tmp_path / name)


def test_a_file_without_metadata_is_read(tmp_path):
    header = json.dumps({"__metadata__": None, "a": entry()}).encode()
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    file = TensorFile(tmp_path / "file.safetensors")
    assert file.metadata == {} and torch.equal(file.tensor("a"), torch.zeros(4))
