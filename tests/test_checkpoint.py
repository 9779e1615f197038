"""Files: what we write is what torch.save writes, whole or not at all; what we read is whole, or one line says what is wrong."""

import json
import os
import pathlib
import resource
import signal
import struct
import sys
import zipfile

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.adapters import load_adapter, read_adapter, save_adapter, sidecar
from rwkv_bone.files.atomic import atomic
from rwkv_bone.files.models import fingerprint, load_model
from rwkv_bone.files.pth import Streamed, give_back, open_tensors, save_tensors, write_pth
from rwkv_bone.peft import METHODS, adapter_tensors, inject
from rwkv_bone.training.resume import load_state, save_state
from tests.runs import forked


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype; scalars, empty tensors, views, and sizes around the borders of pages and of 64 bytes."""
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "empty.matrix": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "transposed": torch.randn(5, 7).T,
        "strided": torch.randn(20)[::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "ünïcode": torch.randn(2, dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(63, dtype=torch.uint8),
        "int64": torch.arange(5),
        "int32": torch.arange(5, dtype=torch.int32),
        "large": torch.randn(1536, 1024),
    }
    return tensors | {f"half.{n}": torch.randn(n).to(torch.float16) for n in (1, 31, 32, 33, 2047, 2048, 2049)}


def damage(path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


# ---------------------------------------------------------------- the .pth that we write


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_back_every_tensor_that_we_write(tmp_path, mmap):
    tensors = odd_tensors()
    save_tensors(tmp_path / "m.pth", tensors)
    read = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mmap)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert read[name].is_contiguous(), name
        assert torch.equal(read[name], tensor), name


def test_the_pickle_is_byte_for_byte_that_of_torch_save(tmp_path):
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in odd_tensors().items()}
    save_tensors(tmp_path / "ours.pth", tensors)
    torch.save(tensors, tmp_path / "torch.pth")
    pickles = []
    for name in ("ours", "torch"):
        with zipfile.ZipFile(tmp_path / f"{name}.pth") as archive:
            pickles.append(archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
    assert pickles[0] == pickles[1]


def test_every_member_is_stored_aligned_to_64_bytes_with_its_checksum(tmp_path):
    save_tensors(tmp_path / "m.pth", odd_tensors())
    raw = (tmp_path / "m.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            name, extra = struct.unpack_from("<HH", raw, info.header_offset + 26)  # their lengths in the local header
            start = info.header_offset + 30 + name + extra
            assert start % 64 == 0, info.filename
            assert raw[start : start + info.file_size] == archive.read(info), info.filename


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = odd_tensors()
    save_tensors(tmp_path / "a.pth", tensors)
    save_tensors(tmp_path / "b.pth", tensors)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_tensors_that_break_their_promise_leave_no_file(tmp_path):
    layout = {"a": (torch.float32, (2,))}
    for tensors in ([], [("a", torch.zeros(3))], [("b", torch.zeros(2))]):
        with pytest.raises(AssertionError):
            write_pth(tmp_path / "m.pth", layout, tensors)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- whole or not at all


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "m.pth").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic(tmp_path / "m.pth") as file:
        file.write(b"new")
        raise RuntimeError("half way")
    assert (tmp_path / "m.pth").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.pth"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of ZipFiles that did not come to be
def test_interrupted_anywhere_in_the_writing_of_an_archive_it_says_so_and_leaves_nothing(tmp_path):
    """Ctrl-C at every third line of zipfile in turn: what comes out is that and no other exception, and no file."""
    for moment in range(0, 10**6, 3):
        lines = iter(range(moment, -1, -1))

        def trace(frame, event, arg, lines=lines):
            if frame.f_code.co_filename != zipfile.__file__ or frame.f_code.co_name == "__del__":
                return None
            if event == "line" and next(lines, None) == 0:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            save_tensors(tmp_path / "m.pth", {"a": torch.zeros(3), "b": torch.zeros(5)})
            break
        except KeyboardInterrupt:
            assert os.listdir(tmp_path) == []
        finally:
            sys.settrace(None)
    assert moment > 200
    assert os.listdir(tmp_path) == ["m.pth"]


def test_writing_through_a_link_replaces_what_it_leads_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.pth").write_bytes(b"old")
    (tmp_path / "link.pth").symlink_to(tmp_path / "disk" / "real.pth")
    with atomic(tmp_path / "link.pth") as file:
        file.write(b"new")
    assert (tmp_path / "link.pth").is_symlink()
    assert (tmp_path / "disk" / "real.pth").read_bytes() == b"new"


def test_killed_while_writing_it_leaves_the_old_file_and_a_temporary_name(tmp_path):
    (tmp_path / "m.pth").write_bytes(b"old")

    def write() -> None:
        with atomic(tmp_path / "m.pth") as file:
            file.write(b"new" * 1000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(write).returncode == -signal.SIGKILL
    assert (tmp_path / "m.pth").read_bytes() == b"old"
    assert [name.startswith("m.pth.") and name.endswith(".tmp") for name in sorted(os.listdir(tmp_path))] == [False, True]


UNWRITABLE = {
    "a folder": lambda p: (p / "m.pth").mkdir(),
    "below a file": lambda p: (p / "below").write_bytes(b""),
    "no such device": lambda p: (p / "m.pth").symlink_to("/proc/nothing/here"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_place_that_cannot_be_written_gives_one_line(case, tmp_path):
    UNWRITABLE[case](tmp_path)
    path = tmp_path / "below" / "m.pth" if case == "below a file" else tmp_path / "m.pth"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"m\.pth: cannot be written \(.+\); nothing was changed$"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_a_full_disk_gives_one_line_and_leaves_all_as_it_was(what, tmp_path):
    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(UserError, match=r"/m\.pth: cannot be written \(File too large\); nothing was changed$"):
            if what == "model":
                save_tensors(tmp_path / "m.pth", {"a": torch.zeros(1000), "b": torch.zeros(100_000)})
            else:
                save_adapter(tmp_path / "m.pth", {"a": torch.zeros(100_000)}, {"method": "none", "options": {}, "base": {}})

    (tmp_path / "m.pth").write_bytes(b"old")
    (tmp_path / "m.json").write_bytes(b"old")
    assert forked(save).returncode == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.pth": b"old", "m.json": b"old"}


# ---------------------------------------------------------------- models


def test_a_model_survives_saving_and_loading_bit_for_bit(make_model, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = make_model(dtype=dtype)
        save_tensors(tmp_path / "m.pth", model.state_dict())
        loaded = load_model(tmp_path / "m.pth")
        assert loaded.sizes == model.sizes
        for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items()):
            assert name == other
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def test_loading_copies_nothing_and_training_leaves_the_file_alone(make_model, tmp_path):
    save_tensors(tmp_path / "m.pth", make_model().state_dict())
    before = (tmp_path / "m.pth").read_bytes()
    model = load_model(tmp_path / "m.pth")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("m.pth")]
    for name, p in model.named_parameters():
        assert any(int(low, 16) <= p.data_ptr() < int(high, 16) for low, high in ranges), f"{name} is not in the mapping"
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (tmp_path / "m.pth").read_bytes() == before


NOT_MODELS = {
    "no such file": None,
    "not a file": "folder",
    r"not a \.pth of tensors \(torch 1\.6 or later\), or cut short": b"",
    "or cut short": b"RWKV" * 1000,
    r"it holds pathlib\.PosixPath, not tensors alone": {"a": torch.zeros(2), "b": pathlib.Path("x")},
    "wanted a flat .pth, name -> tensor": [torch.zeros(2)],
    "name -> tensor, and found": {"model": {"a": torch.zeros(2)}},
    "found something else": {1: torch.zeros(2)},
    "and found something": {},
    "wanted a flat": {"a": torch.zeros(2, 2).to_sparse()},
    r"emb\.weight is torch\.int64; wanted bfloat16": {"emb.weight": torch.zeros(2, 2, dtype=torch.int64)},
    r"emb\.weight is empty, \(0, 2\)": {"emb.weight": torch.zeros(0, 2)},
    "no model known here": {"a": torch.zeros(2)},
    "an RWKV-7 .x070. model without emb.weight": {"blocks.0.att.r_k": torch.zeros(2)},
    "this is an RWKV-5 model": {"blocks.0.att.time_decay": torch.zeros(2), "blocks.0.att.ln_x.weight": torch.zeros(2)},
    "this is an RWKV-4 model": {"blocks.0.att.time_decay": torch.zeros(2)},
    "has a shape and no values": {"emb.weight": torch.zeros(2, 2, device="meta")},
    "without emb.weight": {"blocks.0.att.time_maa_x": torch.zeros(1, 1, 2)},
}


@pytest.mark.parametrize("message", NOT_MODELS)
def test_what_is_no_rwkv6_model_is_refused_in_one_line(message, tmp_path):
    content, path = NOT_MODELS[message], tmp_path / "m.pth"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_model_with_a_tensor_too_few_too_many_or_of_another_shape_is_refused(make_model, tmp_path):
    whole = make_model().state_dict()
    head = whole["head.weight"]
    for tensors, message in (
        ({n: t for n, t in whole.items() if n != "blocks.1.ffn.key.weight"}, r"1 missing \(blocks\.1\.ffn\.key\.weight\)"),
        (whole | {"blocks.0.att.key.bone": head}, r"1 unknown \(blocks\.0\.att\.key\.bone\)"),
        (whole | {"head.weight": head[1:]}, r"head\.weight is \(49, 24\), the other tensors of the file ask for \(50, 24\)"),
        (whole | {"blocks.0.att.r_k": torch.zeros(1, 1000)}, "head size 1000 does not divide"),
        (whole | {"blocks.7.ln1.weight": head[0]}, "not a whole .* model of 3 layers"),
    ):
        save_tensors(tmp_path / "m.pth", tensors)
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m.pth")


def test_the_fingerprint_tells_models_apart_and_knows_one_again(make_model, tmp_path):
    model = make_model()
    save_tensors(tmp_path / "m.pth", model.state_dict())
    known = load_model(tmp_path / "m.pth").fingerprint
    assert known == fingerprint(dict(reversed(model.state_dict().items())))  # of the tensors, not of the file
    assert known == load_model(tmp_path / "m.pth", dtype=torch.float32).fingerprint  # of the file, not of the model
    assert known != fingerprint(make_model(seed=1).state_dict())
    assert known != fingerprint({n: t.float() for n, t in model.state_dict().items()})
    last = {n: t.clone() for n, t in model.state_dict().items()}
    last["head.weight"].view(-1)[-1] += 1
    assert known != fingerprint(last)


@pytest.mark.parametrize(("converted", "times"), [(False, 1), (True, 5)])  # two of 4000 bytes each time
def test_streamed_tensors_are_the_files_and_stay_good_when_memory_is_given_back(converted, times, tmp_path):
    tensors = {f"t{i}": torch.randn(1000) for i in range(9)}
    save_tensors(tmp_path / "m.pth", tensors)
    opened = []

    def open_():
        opened.append(1)
        return {n: t.clone() if converted else t for n, t in open_tensors(tmp_path / "m.pth").items()}

    streamed = Streamed(open_, budget=10_000)
    kept = {name: streamed[name] for name in streamed}
    assert len(opened) == times
    for name, tensor in kept.items():
        assert torch.equal(tensor, tensors[name])


def resident() -> float:
    """MiB of files' pages in this process's memory."""
    return int(pathlib.Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024


def test_mapped_pages_are_given_back_and_no_other_memory_is_touched(tmp_path):
    save_tensors(tmp_path / "m.pth", {"t": torch.ones(16 << 20)})
    mapped = open_tensors(tmp_path / "m.pth")
    before = resident()
    assert mapped["t"].sum() == 16 << 20 and resident() > before + 60
    assert give_back(mapped.values()) and resident() < before + 4
    assert mapped["t"].sum() == 16 << 20
    own = torch.ones(4 << 20)
    assert not give_back([*mapped.values(), own]) and own.sum() == 4 << 20


# ---------------------------------------------------------------- adapters


INFO = {"method": "bone", "options": {"r": 5}, "step": 7}


def adapted(make_model, tmp_path, parts=("time", "ln"), **options):
    """A base's file, a model on it with a trained adapter and trained parts, and the adapter's file."""
    save_tensors(tmp_path / "base.pth", make_model().state_dict())
    model = load_model(tmp_path / "base.pth")
    method = METHODS["bone"]
    inject(model, method, method.config_from({"r": 5, **options}, "bone"))
    for name, p in model.named_parameters():
        p.requires_grad |= any(model.in_part(name, part) for part in parts)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    base = {"file": "base.pth", "fingerprint": model.fingerprint}
    save_adapter(tmp_path / "adapter.pth", adapter_tensors(model), {**INFO, "base": base})
    return model


@torch.no_grad()
def test_base_file_and_adapter_file_are_the_model(make_model, tmp_path):
    model = adapted(make_model, tmp_path)
    loaded = load_model(tmp_path / "base.pth")
    info = load_adapter(loaded, tmp_path / "adapter.pth")
    assert info["step"] == 7
    idx = torch.randint(50, (2, 9))
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trains


def test_an_adapter_says_all_of_itself_and_the_sidecar_is_a_copy(make_model, tmp_path):
    adapted(make_model, tmp_path)
    tensors, info = read_adapter(tmp_path / "adapter.pth")
    assert json.loads(sidecar(tmp_path / "adapter.pth").read_text()) == info
    assert info["options"] == {"r": 5}
    assert info["base"]["file"] == "base.pth"
    sidecar(tmp_path / "adapter.pth").write_text("not json")
    assert read_adapter(tmp_path / "adapter.pth")[1] == info
    sidecar(tmp_path / "adapter.pth").unlink()
    assert read_adapter(tmp_path / "adapter.pth")[1] == info
    plain = torch.load(tmp_path / "adapter.pth", weights_only=True)  # other programs see tensors under the community's names
    assert plain.keys() == tensors.keys()
    assert plain["blocks.0.att.key.bone"].shape == (5, 5, 5)


def test_defaults_of_the_method_are_written_too(tmp_path):
    save_adapter(tmp_path / "a.pth", {}, {"method": "bone", "options": {}, "base": {}})
    assert json.loads((tmp_path / "a.json").read_text())["options"] == {"r": 64}


def test_any_byte_of_an_adapter_that_is_damaged_is_noticed(make_model, tmp_path):
    adapted(make_model, tmp_path)
    with zipfile.ZipFile(tmp_path / "adapter.pth") as archive:
        members = {info.filename: info for info in archive.infolist()}
    raw = (tmp_path / "adapter.pth").read_bytes()
    for name in ("archive/data/0", "archive/data/9", "archive/rwkv_bone.json", "archive/data.pkl"):
        start = raw.index(zipfile.ZipFile(tmp_path / "adapter.pth").read(name), members[name].header_offset)
        damage(tmp_path / "adapter.pth", start + 5, bytes([raw[start + 5] ^ 1]))
        with pytest.raises(UserError, match=f"damaged: {name} does not have its checksum"):
            read_adapter(tmp_path / "adapter.pth")
        damage(tmp_path / "adapter.pth", 0, raw)


OPTIONS = [  # of a file whose tensors are Bone's with r = 5
    '{"r": "5"}', '{"r": 5.0}', '{"r": true}', '{"r": null}', '{"r": [5]}', '{"r": 0}', '{"r": -5}', '{"r": 6}', '{"r": 1e999}',
    '{"r": NaN}', f'{{"r": {10**9}}}', f'{{"r": {10**40}}}', f'{{"r": {"1" * 5000}}}', '{"q": 5}', "[]", "null", '"r"',
]  # fmt: skip
RECORDS = [
    *("", "[", "[]", "null", "1", '"bone"', "{}", "[" * 100_000, "\xff", '{"method": "bone"}'),
    *('{"method": %s, "options": {"r": 5}, "base": {}}' % method for method in ("1", '["bone"]', '"bon"', '"none"', "null")),  # noqa: UP031
    *('{"method": "bone", "options": %s, "base": {}}' % options for options in OPTIONS),  # noqa: UP031
    *('{"method": "bone", "options": {"r": 5}, "base": %s}' % b for b in ("{}", '"x"', '{"fingerprint": 5, "file": {}}')),  # noqa: UP031
]


@pytest.mark.parametrize("text", RECORDS, ids=range(len(RECORDS)))
def test_an_odd_record_gives_one_line(text, make_model, tmp_path):
    adapted(make_model, tmp_path)
    tensors, _ = read_adapter(tmp_path / "adapter.pth")
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_pth(tmp_path / "odd.pth", layout, tensors.items(), {"rwkv_bone.json": text.encode("latin-1")})
    model = load_model(tmp_path / "base.pth")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"odd\.pth: ") as caught:
        load_adapter(model, tmp_path / "odd.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_is_used_whole_or_not_at_all(make_model, tmp_path):
    adapted(make_model, tmp_path)
    tensors, info = read_adapter(tmp_path / "adapter.pth")
    bone = tensors["blocks.0.att.key.bone"]
    for odd, message in (
        ({"blocks.0.att.kye.bone": bone}, r"1 tensors that this model has no place for \(blocks\.0\.att\.kye\.bone\)"),
        ({"blocks.9.att.key.bone": bone}, r"no place for \(blocks\.9\.att\.key\.bone\)"),
        ({"blocks.0.ln1.bone": bone}, r"no place for"),
        ({"emb.bone": bone}, r"no place for"),
        ({"bone": bone}, r"no place for \(bone\)"),
        ({"blocks.0.att.key.bones": bone}, r"blocks\.0\.att\.key\.bones is no tensor of the method bone"),
        ({"blocks.0.att.key.bone": bone[:4]}, r"blocks\.0\.att\.key\.bone is torch\.float64 \(4, 5, 5\); .* must be \(5, 5, 5\)"),
        ({"blocks.0.att.key.bone": bone.long()}, r"is torch\.int64"),
        ({"blocks.0.att.w0": torch.zeros(3)}, r"blocks\.0\.att\.w0 is .* must be \(1, 1, 24\)"),
        ({"blocks.0.att.time_state": torch.zeros(3, 8, 8)}, r"lacks 1 of its tensors \(blocks\.1\.att\.time_state\)"),
    ):
        save_adapter(tmp_path / "odd.pth", {**tensors, **odd}, info)
        with pytest.raises(UserError, match=message):
            load_adapter(load_model(tmp_path / "base.pth"), tmp_path / "odd.pth")


# ---------------------------------------------------------------- an adapter and its sidecar


@pytest.mark.parametrize(("moment", "step"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)])
def test_killed_while_saving_an_adapter_is_the_old_one_or_the_new_one_whole(moment, step, tmp_path, monkeypatch):
    """The moments: before the .pth is on disk, before it takes its name, the same of the sidecar, and none."""
    moments = iter(range(1, 5))

    def save(step: int) -> None:
        info = {"method": "none", "options": {}, "base": {}, "step": step}
        save_adapter(tmp_path / "a.pth", {"emb.weight": torch.full((300, 300), float(step))}, info)

    def or_killed(call):
        def called(*args):
            if next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return called

    save(1)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, or_killed(getattr(os, name)))
    assert forked(lambda: save(2)).returncode == (-signal.SIGKILL if moment < 5 else 0)
    tensors, info = read_adapter(tmp_path / "a.pth")
    assert info["step"] == step and (tensors["emb.weight"] == step).all()


# ---------------------------------------------------------------- training state


def test_a_step_checkpoint_survives_and_a_damaged_one_is_refused(tmp_path):
    state = {"step": 3, "trained": {"a": torch.randn(100)}, "optimiser": {"state": [torch.randn(1000), 0.5, None, "x"]}}
    save_state(tmp_path / "s.ckpt", state)
    loaded = load_state(tmp_path / "s.ckpt")
    assert torch.equal(loaded["optimiser"]["state"][0], state["optimiser"]["state"][0])
    raw = (tmp_path / "s.ckpt").read_bytes()
    at = raw.index(as_raw(state["optimiser"]["state"][0]))
    damage(tmp_path / "s.ckpt", at + 40, b"\xff")
    with pytest.raises(UserError, match="does not have its checksum"):
        load_state(tmp_path / "s.ckpt")
    for size in (0, 1, len(raw) // 2, len(raw) - 1):
        (tmp_path / "s.ckpt").write_bytes(raw[:size])
        with pytest.raises(UserError, match="damaged or cut short"):
            load_state(tmp_path / "s.ckpt")


def as_raw(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
