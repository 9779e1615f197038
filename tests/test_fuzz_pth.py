"""Damaged files: whatever was done to a model, an adapter or a checkpoint, it is refused in one line or something whole is read.

The reading is done by another process, so that a crash, a hang or endless memory there is a failure here and not the end of it.
`FUZZ_EXAMPLES=20000 pytest tests/test_fuzz_pth.py` tries longer.
"""

import ast
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_bone.files.adapters import save_adapter
from rwkv_bone.files.models import fingerprint
from rwkv_bone.files.pth import layout_of, save_tensors
from rwkv_bone.files.safetensors import write_safetensors
from rwkv_bone.interop.web_rwkv import web_name, web_tensor
from rwkv_bone.training.resume import save_state
from tests.conftest import small_model

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
SECONDS = 30  # far more than any reading takes
KINDS = {"ours": "model", "torchs": "model", "web": "model", "adapter": "adapter", "foreign": "adapter", "state": "state"}

READER = """
import resource, sys, torch
from rwkv_bone.files.adapters import load_adapter, read_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.training.resume import load_state
from rwkv_bone.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
base = sys.argv[1]

def read(kind, path):
    if kind == "state":
        return load_state(path)
    if kind == "model":
        return [p.double().sum() for p in load_model(path).parameters()]  # every page is there
    tensors, _ = read_adapter(path)
    return [t.double().sum() for t in tensors.values()], load_adapter(load_model(base), path)

for line in sys.stdin:
    kind, path = line.split()
    try:
        read(kind, path)
        print("whole", flush=True)
    except UserError as error:
        print("refused", repr(str(error)), flush=True)
    except BaseException as error:
        print("failed", type(error).__name__, repr(str(error)), flush=True)
"""


class Reader:
    """The other process; started anew when it was lost."""

    def __init__(self, base: Path):
        self.base, self.process = base, None

    def answer(self, kind: str, path: Path) -> str:
        if self.process is None:
            argv = [sys.executable, "-c", READER, str(self.base)]
            self.process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.answers: queue.Queue[str] = queue.Queue()
            threading.Thread(target=self.listen, args=(self.process.stdout, self.answers), daemon=True).start()
            self.answer("state", self.base)  # imports torch, which may take its time
        self.process.stdin.write(f"{kind} {path}\n")
        self.process.stdin.flush()
        try:
            line = self.answers.get(timeout=SECONDS)
        except queue.Empty:
            line = f"hung for {SECONDS} s"
        if line.startswith(("hung", "died")):
            self.close()
        return line.strip()

    @staticmethod
    def listen(stream, answers: queue.Queue) -> None:
        for line in stream:
            answers.put(line)
        answers.put("died")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[str, bytes]]:
    """Name -> kind and bytes of one sound file of each format."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    model = small_model(n_layer=1, n_embd=8, dim_att=8, dim_ffn=12, vocab_size=7, head_size=4, dtype=torch.float16)
    tensors = model.state_dict()
    save_tensors(folder / "ours", tensors)
    torch.save(dict(tensors), folder / "torchs")
    web = model.web_names
    with open(folder / "web", "wb") as file:
        renamed = {web_name(web, name): web_tensor(web, name, t).contiguous() for name, t in tensors.items()}
        write_safetensors(file, layout_of(renamed), renamed.items())
    known = {"file": "ours", "fingerprint": fingerprint(tensors)}
    bones = {f"blocks.0.att.{name}.bone": torch.randn(2, 4, 4) for name in ("key", "value")}
    info = {"method": "bone", "options": {"r": 4}, "base": known}
    save_adapter(folder / "adapter", bones | {"ln_out.bias": torch.randn(8)}, info)
    torch.save(bones, folder / "foreign")
    save_state(folder / "state", {"step": 3, "trained": bones, "random": [torch.get_rng_state()], "more": [0.1, None, "x"]})
    return {name: (kind, (folder / name).read_bytes()) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def reader(files, tmp_path_factory):
    base = tmp_path_factory.mktemp("base") / "base.pth"
    base.write_bytes(files["ours"][1])
    reader = Reader(base)
    yield reader
    reader.close()


def check(reader: Reader, files, name: str, data: bytes, path: Path) -> str:
    path.write_bytes(data)
    answer = reader.answer(files[name][0], path)
    assert answer == "whole" or answer.startswith("refused"), answer
    if answer != "whole":
        message = ast.literal_eval(answer.removeprefix("refused "))
        assert message.isprintable()
        assert len(message) < 500
        assert str(path) in message
    return answer


@pytest.mark.parametrize("name", KINDS)
def test_a_sound_file_is_read_whole(name, reader, files, tmp_path):
    assert check(reader, files, name, files[name][1], tmp_path / "x") == "whole"


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_short_anywhere_is_refused(name, reader, files, tmp_path):
    data = files[name][1]
    lengths = {0, 1, 7, 8, 9, 63, 64, 65, len(data) - 1, len(data) - 21, len(data) - 22, len(data) - 23}
    for length in sorted(lengths | {len(data) * i // 23 for i in range(23)}):
        assert check(reader, files, name, data[:length], tmp_path / "x").startswith("refused"), length


SIGNATURES = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\x80\x02}", b"FB", b"shape"]


def accident(data: bytes, draw) -> bytes:
    """One accident, at a place of structure more often than by chance."""
    near = [at for s in SIGNATURES if (at := data.find(s, draw(st.integers(0, len(data))))) >= 0]
    start = draw(st.integers(0, len(data)))
    if near and draw(st.booleans()):
        start = min(draw(st.sampled_from(near)) + draw(st.integers(0, 80)), len(data))
    size = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 100, 10_000]))
    flipped = bytes([byte ^ 1 << draw(st.integers(0, 7)) for byte in data[start : start + 1]])
    here = [flipped, b"", b"\0" * size, b"\xff" * size, data[start // 2 : start // 2 + size], data[-size:]]
    new = draw(st.sampled_from(here) | st.binary(min_size=size, max_size=size))
    after = draw(st.sampled_from([start + len(new), start + size, start]))  # overwritten, replaced, inserted
    return data[:start] + new + data[after:]


@st.composite
def damages(draw, data: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        data = accident(data, draw)
    return data


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_damage_anywhere_is_read_or_refused_in_one_line(name, reader, files, tmp_path_factory):
    path = tmp_path_factory.mktemp(name) / "x"
    answers = []

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damages(files[name][1]))
    def damaged(data: bytes) -> None:
        answers.append(check(reader, files, name, data, path))

    damaged()
    assert any(answer.startswith("refused") for answer in answers)
