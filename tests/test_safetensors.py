"""safetensors: what we write, the format's own library reads, and the other way round; what does not fit is refused."""

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


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    write(tmp_path / "x", {"a": torch.ones(2, 3)})
    whole = (tmp_path / "x").read_bytes()
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    wrong = len(header).to_bytes(8, "little") + header + bytes(8)
    for damaged in (b"", whole[:4], whole[:20], whole[:-1], whole + b"x", wrong, (2**63).to_bytes(8, "little") + whole[8:]):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(UserError, match=r"x: not a safetensors file, or damaged or cut short \(") as caught:
            open_safetensors(tmp_path / "x")
        assert "\n" not in str(caught.value)
