"""safetensors: what we write, the format's own library reads, and the other way round; what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from rwkv_bone.errors import UserError
from rwkv_bone.files.pth import layout_of
from rwkv_bone.files.safetensors import DTYPES, is_safetensors, open_safetensors, write_safetensors


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes before wide dtypes so that those lie unaligned, scalars and empty tensors."""
    tensors = {f"t.{name}": torch.randint(0, 2, (5, 3)).to(dtype) for name, dtype in reversed(DTYPES.items())}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "ünï": torch.randn(2, 2).T}


def write(path, tensors, metadata=None) -> None:
    with open(path, "wb") as file:
        write_safetensors(file, layout_of(tensors), tensors.items(), metadata)


def test_its_own_library_reads_what_we_write(tmp_path):
    tensors = odd_tensors()
    write(tmp_path / "x", tensors, {"made": "here"})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}


def test_we_read_what_its_own_library_writes_and_our_own(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in odd_tensors().items()}
    save_file(tensors, tmp_path / "theirs", {"a": "b"})
    write(tmp_path / "ours", tensors, {"a": "b"})
    for name in ("theirs", "ours"):
        assert is_safetensors(tmp_path / name)
        read, metadata = open_safetensors(tmp_path / name)
        assert metadata["a"] == "b"
        assert read.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype, key
            assert torch.equal(read[key], tensor), key


def test_reading_maps_the_file_and_never_writes_it(tmp_path):
    write(tmp_path / "x", {"a": torch.ones(1000)})
    before = (tmp_path / "x").read_bytes()
    read, _ = open_safetensors(tmp_path / "x")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("/x")]
    assert any(int(low, 16) <= read["a"].data_ptr() < int(high, 16) for low, high in ranges)
    read["a"].zero_()
    assert (tmp_path / "x").read_bytes() == before


ENTRIES = [
    None, [], {}, {"dtype": "F32", "shape": [2]}, {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]},
    {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
    {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": 8}, {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
    {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]}, {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]},
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_an_entry_that_does_not_fit_is_refused_in_one_line(entry, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"x: not a safetensors file, or damaged or cut short \(.* of a ") as caught:
        open_safetensors(tmp_path / "x")
    assert "\n" not in str(caught.value)


HEADERS = [b"", b"{", b"[]", b"1", b"{}" * 2, b"\xff\xff", b"[" * 99_999, b'{"a"}']


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_is_none_is_refused_in_one_line(header, tmp_path):
    for length in (len(header), len(header) + 9, 2**63):
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(UserError, match=r"x: not a safetensors file, or damaged or cut short"):
            open_safetensors(tmp_path / "x")
