"""Damaged and odd inputs for tests/test_fuzz.py: sound files, what is done to them, the commands that read them, and the verdict.

Each kind of input is a function that puts one odd input into the folder of a case and returns a command line. A case is drawn
from a seed and its number alone: `python -m tests.fuzz KIND NUMBER` runs one case anew, with its traceback.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rwkv_bone.compare.command import main as compare
from rwkv_bone.data.jsonl_to_binidx import main as data
from rwkv_bone.errors import run
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.adapters import save_adapter
from rwkv_bone.files.models import fingerprint
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.generate.command import main as generate
from rwkv_bone.merging.command import main as merge
from rwkv_bone.plot import main as plot
from rwkv_bone.training import memory
from rwkv_bone.training.run import main as train
from tests.conftest import small_model

COMMANDS = {"train": train, "merge": merge, "generate": generate, "evaluate": evaluate, "data": data, "plot": plot,
            "compare": compare}  # fmt: skip
OWN = ("run/", "results.jsonl")  # what commands themselves made, and may go on with
SECONDS = 10  # of CPU time: far more than any case takes
MEMORY = 6 << 30
LONG = "n" * 4000
DEEP = "@deep@"  # stands for lists in lists, 100,000 of them
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 7, 1.5, -0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "x", "\ud800",
    "\0", "a\nb", "\x1b[2J", "ü", "none", "bone", LONG, "../../x", "/", [], {}, [[]], [None], [1, "x"], {"a": 1}, {"": []}, DEEP,
]  # fmt: skip

# ---------------------------------------------------------------- the sound files


def make_world(folder: Path) -> Path:
    """One sound file of each kind in `folder`."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 8, "dim_att": 8, "dim_ffn": 12, "vocab_size": 257, "head_size": 4}
    model = small_model(version="x060", dtype=torch.bfloat16, **sizes)
    tensors = model.state_dict()
    save_tensors(folder / "base.pth", tensors)
    base = {"file": "base.pth", "fingerprint": fingerprint(tensors)}
    pairs = {"key": (8, 8), "value": (8, 8)}
    bones = {f"blocks.0.att.{name}.bone": torch.randn(2, 4, 4) for name in pairs}
    loras = {f"blocks.0.att.{n}.lora_{k}": torch.randn(s) for n in pairs for k, s in (("A", (2, 8)), ("B", (8, 2)))}
    state = {"blocks.0.att.time_state": torch.randn(2, 4, 4)}
    parts = {"ln_out.bias": torch.randn(8)}
    save_adapter(folder / "bone.pth", bones | parts, {"method": "bone", "options": {"r": 4}, "base": base})
    save_adapter(folder / "lora.pth", loras, {"method": "lora", "options": {"r": 2, "alpha": 4.0}, "base": base})
    save_adapter(folder / "state.pth", state, {"method": "none", "options": {}, "base": base})
    torch.save(bones, folder / "foreign.pth")
    rows = [{"question": f"{i} + {i}?", "answer": f"{2 * i}."} for i in range(8)] + [{"text": "User: a\n\nAssistant: b"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [bytes([i]) for i in range(256)] + [b"ab", "ü".encode()]
    (folder / "vocab.txt").write_text("".join(f"{i} {word!r} {len(word)}\n" for i, word in enumerate(words, 1)))
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a"], vocab_size=256, show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "template.jinja").write_text((Path("rwkv_bone/data/templates/world.jinja")).read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}{{ m.role }}: {{ m['content'] }}\n{% endfor %}", "bos_token": "<s>",
                    "eos_token": {"content": "</s>"}})
    )  # fmt: skip
    config = {
        "load_model": "base.pth", "data_file": "data.jsonl", "held_out": "data.jsonl", "held_out_documents": 4, "steps": 2,
        "ctx_len": 48, "micro_bsz": 2, "methods": {"bone": {"r": 4}, "lora": {"lrs": [1e-3]}, "none": {}}, "seeds": [0, 1],
    }  # fmt: skip
    (folder / "compare.json").write_text(json.dumps(config))
    for argv in (
        ["merge", "--base_model", "base.pth", "--output", "base.st"],
        ["merge", "--base_model", "base.pth", "--peft_checkpoint", "lora.pth", "--as", "peft", "--output", "peft"],
        ["merge", "--base_model", "base.pth", "--peft_checkpoint", "state.pth", "--as", "state", "--output", "state.st"],
        ["data", "data.jsonl", "tokens", "--vocab_size", "257"],
        ["evaluate", "loss", "--model", "base.pth", "--data", "data.jsonl", "--out", "results.jsonl"],
        TRAIN[:-1],
    ):
        code, said = called(argv, folder)
        assert code == 0, said
    return folder


TRAIN = ("train --load_model base.pth --data_file data.jsonl --proj_dir run --accelerator cpu --op torch --r 4 --ctx_len 48 "
         "--micro_bsz 2 --epoch_steps 2 --epoch_count 2 --threads 1 --save_every_steps 1 --dry_run").split()  # fmt: skip


# ---------------------------------------------------------------- what is done to them


def damaged(rng: random.Random, content: bytes) -> bytes:
    """One to three accidents, at a place of structure more often than by chance."""
    for _ in range(rng.randint(1, 3)):
        start, size = rng.randint(0, len(content)), rng.choice([1, 1, 1, 2, 4, 8, 100, 10_000])
        signature = rng.choice([b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x80\x02}", b"FB", b"shape", b'"', b"{", b"\n"])
        if rng.random() < 0.5 and (at := content.find(signature, start)) >= 0:
            start = min(at + rng.randint(0, 80), len(content))
        flipped = bytes(byte ^ 1 << rng.randint(0, 7) for byte in content[start : start + 1])
        new = rng.choice([flipped, b"", b"\0" * size, b"\xff" * size, content[-size:], rng.randbytes(size)])
        after = rng.choice([start + len(new), start + size, start, len(content)])  # overwritten, replaced, inserted, cut off
        content = content[:start] + new + content[after:]
    return content


def altered(rng: random.Random, tree: Any) -> Any:
    """JSON with one to three of its values, names or items replaced, lost or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        holders = [node for node in nodes(tree) if isinstance(node, dict | list) and node]
        if not holders:
            return rng.choice(STRANGE)
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        value = rng.choice([rng.choice(STRANGE), rng.choice(STRANGE), [holder[key]], {"a": holder[key]}, str(holder[key])])
        match rng.choice(["replace", "replace", "replace", "lose", "name", "double"]):
            case "replace":
                holder[key] = value
            case "lose":
                del holder[key]
            case "name" if isinstance(holder, dict):
                holder[str(rng.choice(STRANGE))[:4000]] = holder.pop(key)
            case _ if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(rng.choice(holder)))
            case _:
                holder["more"] = value
    return rng.choice(STRANGE) if rng.random() < 0.03 else tree


def nodes(tree: Any):
    yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from nodes(child)


def written(tree: Any) -> bytes:
    text = json.dumps(tree).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode()


def odd_json(rng: random.Random, path: Path) -> None:
    """Another value in a file of JSON, or in one line of several."""
    content = path.read_bytes()
    if rng.random() < 0.2:
        path.write_bytes(damaged(rng, content))
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = written(altered(rng, json.loads(lines[at])))
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(written(altered(rng, json.loads(content))))


DTYPES = (torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2)


def odd_tensor(rng: random.Random, t: torch.Tensor) -> Any:
    return rng.choice([
        lambda: t.to(rng.choice(DTYPES)),
        lambda: t.to("meta"),
        lambda: torch.full_like(t, rng.choice([float("nan"), float("inf"), 3e38])),
        lambda: t[None],
        lambda: t[..., :-1],
        lambda: t.flatten(),
        lambda: t[:0],
        lambda: t.t() if t.dim() == 2 else t.sum(),
        lambda: torch.cat([t, t]) if t.dim() else t,
        lambda: t.new_zeros(1).expand(1 << 40),
        lambda: t.to_sparse() if not t.is_meta else t,
        lambda: t.tolist() if t.numel() < 100 else None,
        lambda: rng.choice(STRANGE),
    ])()  # fmt: skip


def odd_tensors(rng: random.Random, tensors: dict[str, Any]) -> Any:
    """A file's tensors with one to three of them altered, lost, renamed; or under another key, or a list."""
    tensors = dict(tensors)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(tensors) or ["x"])
        tensor = tensors.get(name, torch.zeros(2))
        match rng.choice(["alter", "alter", "alter", "lose", "rename", "add", "swap"]):
            case "alter" if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                tensors[name] = odd_tensor(rng, tensor)
            case "lose":
                tensors.pop(name, None)
            case "rename":
                other = [f"{name}.x", str(name).replace("0", "7"), str(name).replace("att", "ffn"), "", LONG, 3, "\ud800"]
                tensors[rng.choice(other)] = tensors.pop(name, tensor)
            case "add":
                tensors[rng.choice(["x", "blocks.1.att.key.bone", "emb.weight", "blocks.0.att.key.lora_A"])] = tensor
            case _:
                tensors[name] = tensors.get(rng.choice(list(tensors) or [name]), tensor)
    return rng.choice([tensors] * 8 + [{"state_dict": tensors}, list(tensors.values()), tensor, {**tensors, "x": {}}])


def odd_pth(rng: random.Random, path: Path, record: str = "rwkv_bone.json") -> None:
    """Bytes damaged, tensors altered (as torch saves them), or, of an adapter, its record."""
    how = rng.random()
    if how < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    tensors = torch.load(path, weights_only=True)
    if record in members and how < 0.65:
        members[record] = written(altered(rng, json.loads(members[record])))
    else:
        file = io.BytesIO()
        torch.save(odd_tensors(rng, tensors), file)
        with zipfile.ZipFile(file) as archive:
            new = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        members = {**new, record: members[record]} if record in members else new
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)


def odd_safetensors(rng: random.Random, path: Path) -> None:
    """Bytes damaged, or another header."""
    content = path.read_bytes()
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, content))
        return
    length = int.from_bytes(content[:8], "little")
    header = written(altered(rng, json.loads(content[8 : 8 + length])))
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


# ---------------------------------------------------------------- the kinds of input, each with commands that read it

MERGE = "merge --base_model base.pth --output out/m.pth".split()
GENERATE = "generate --model base.pth --max_tokens 2 --op torch --prompt ab".split()
LOSS = "evaluate loss --model base.pth --data data.jsonl --op torch --out out/results.jsonl".split()
DATA = "data data.jsonl out/tokens --vocab_size 300".split()


def base_model(rng: random.Random) -> list[str]:
    odd_pth(rng, Path("base.pth"))
    more = ["--dtype", "fp32"], ["--peft_checkpoint", "bone.pth"], ["--peft_checkpoint", "bone.pth", "--force", "--verify"]
    return rng.choice([*(MERGE + words for words in more), GENERATE, LOSS, TRAIN])


def adapter(rng: random.Random) -> list[str]:
    name = rng.choice(["bone.pth", "bone.pth", "lora.pth", "state.pth", "foreign.pth"])
    odd_pth(rng, Path(name))
    more = [[], ["--force"], ["--verify"], ["--as", "lora"], ["--as", "peft"], ["--as", "state"], ["--lora_alpha", "4"]]
    reads = [*([*MERGE, "--peft_checkpoint", name, *words] for words in more), [*GENERATE, "--peft_checkpoint", name]]
    return rng.choice([*reads, [*LOSS, "--peft_checkpoint", name], [*MERGE, "--peft_checkpoint", "bone.pth", name]])


def state_file(rng: random.Random) -> list[str]:
    odd_safetensors(rng, Path("state.st"))
    return rng.choice([[*MERGE, "--peft_checkpoint", "state.st"], [*GENERATE, "--peft_checkpoint", "state.st"]])


def peft_folder(rng: random.Random) -> list[str]:
    if rng.random() < 0.6:
        odd_json(rng, Path("peft/adapter_config.json"))
    else:
        odd_safetensors(rng, Path("peft/adapter_model.safetensors"))
    more = rng.choice([[], ["--as", "lora", "--rank", "1"], ["--as", "peft"]])
    return rng.choice([[*MERGE, "--peft_checkpoint", "peft", *more], [*GENERATE, "--peft_checkpoint", "peft"]])


def safetensors_base(rng: random.Random) -> list[str]:
    odd_safetensors(rng, Path("base.st"))
    return [rng.choice(["base.st", word]) if word == "base.pth" else word for word in rng.choice([MERGE, GENERATE, LOSS])]


def rows(rng: random.Random) -> list[str]:
    odd_json(rng, Path("data.jsonl"))
    if rng.random() < 0.2:
        name = rng.choice(["data.json", "data.csv", "data.txt", "data.parquet", "data.jsonl.gz", "data.npy"])
        os.rename("data.jsonl", name)
        return ["data", name, *DATA[2:]]
    more = ["--loss_mask all", "--template g1", "--format text", "--encoding utf-16-le --vocab_size 256", "--fields answer=x"]
    return rng.choice([DATA, *([*DATA, *flags.split()] for flags in more), LOSS])


def binidx(rng: random.Random) -> list[str]:
    path = Path(rng.choice(["tokens.idx", "tokens.bin", "tokens.mask.bin"]))
    path.write_bytes(damaged(rng, path.read_bytes()))
    return [word.replace("data.jsonl", "tokens") for word in LOSS]


def tokenizer(rng: random.Random) -> list[str]:
    odd_json(rng, Path("tokenizer.json"))
    return [*rng.choice([DATA, GENERATE]), "--tokenizer", "tokenizer.json"]


def vocabulary(rng: random.Random) -> list[str]:
    path = Path("vocab.txt")
    lines = path.read_text().splitlines()
    for _ in range(rng.randint(1, 3)):
        words, at = lines[rng.randrange(len(lines))].split(" "), rng.randrange(len(lines))
        odd = ["-1", "0", "2", "99999999999", "b'x", "1" * 5000, "f()", "b''", "'ü'", "[" * 999, ""]
        words[rng.randrange(len(words))] = rng.choice(odd)
        lines[at] = " ".join(words)
    path.write_text("\n".join(lines))
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    return [*DATA, "--tokenizer", "world", "--vocab_file", "vocab.txt"]


def checkpoint(rng: random.Random) -> list[str]:
    path = Path("run/checkpoints/step-00000004.ckpt")
    if rng.random() < 0.4:
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        saved = torch.load(path, weights_only=True)
        part = rng.choice([saved, saved["own"], saved["invariants"], saved["trained"], saved["own"]["optimiser"]])
        key = rng.choice(list(part))
        old = part.pop(key)
        match rng.choice(["lose", "strange", "tensor", "name"]):
            case "strange":
                part[key] = rng.choice([value for value in STRANGE if value is not DEEP])
            case "tensor":
                part[key] = odd_tensor(rng, old if isinstance(old, torch.Tensor) else torch.zeros(3))
            case "name":
                part[rng.choice(["x", 3, ""])] = old
        torch.save(rng.choice([saved] * 9 + [[saved]]), path)
    return [*TRAIN[:-1], "--resume", "auto", "--epoch_count", rng.choice(["2", "3"])]


def record(rng: random.Random) -> list[str]:
    """The JSON that a run leaves: its list of files, its losses, and results of an evaluation."""
    name = rng.choice(["run/run_files.json", "run/run_files.json", "run/loss_data.jsonl", "run/rwkv-0.json", "results.jsonl"])
    odd_json(rng, Path(name))
    if name == "results.jsonl":
        return [*LOSS[:-1], "results.jsonl"]
    again = rng.choice([["--resume", "auto"], ["--overwrite"], []])
    return [*TRAIN[:-1], *again] if "loss" not in name or rng.random() < 0.5 else ["plot", "run", "--out", "out/loss.svg"]


def losses(rng: random.Random) -> list[str]:
    odd_json(rng, Path("run/loss_data.jsonl"))
    return ["plot", "run/loss_data.jsonl", "--out", "out/loss.svg"]


def configuration(rng: random.Random) -> list[str]:
    odd_json(rng, Path("compare.json"))
    return ["compare", "compare.json", "--report", "--out", "out/compare"]


def template(rng: random.Random) -> list[str]:
    if rng.random() < 0.3:
        odd_json(rng, path := Path("tokenizer_config.json"))
    else:
        path = Path("template.jinja")
        text = path.read_text()
        odd = ["{{ x.y.z }}", "{% for %}", "{{ 1/0 }}", "{% raw %}", "{{ 'a' * 3 }}", "{% generation %}", "\ud800", "{{ m",
               "{{ '\\ud800' }}", "{% include 'x' %}", "{{ raise_exception('no') }}", "{{ messages[9] }}",
               "{{ messages | tojson(indent='x') }}",
               "{% set x = namespace(a=1) %}", "{{ strftime_now(3) }}", "{{ ''.__class__.__mro__ }}",
               "{% break %}", "{#"]  # fmt: skip
        for _ in range(rng.randint(1, 2)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(odd) + text[at + rng.choice([0, 0, 5]) :]
        content = text.encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(rng, content) if rng.random() < 0.2 else content)
    instruct = [*GENERATE, "--instruct", "--system", "s"]
    return [*rng.choice([DATA, instruct, LOSS]), "--template", str(path)]


def words(rng: random.Random) -> list[str]:
    """A command line with one to three of its words replaced, lost, doubled, or a flag more."""
    plotted, compared = "plot run --out out/x.svg".split(), "compare compare.json --report --out out/c".split()
    merged = [*MERGE, "--peft_checkpoint", "bone.pth"]
    argv = list(rng.choice([TRAIN, TRAIN, TRAIN, merged, GENERATE, LOSS, DATA, plotted, compared]))
    values = ["", " ", "\r", "-1", "0", "1", "7", "1e9", "nan", "inf", "99999999999999999999", "x", "--", "-", "a=b", "\ud800",
              "\0", "/", ".", "base.pth", "none", LONG, "[]", "['att']", "*", "data.jsonl,tokens", "world", "run"]  # fmt: skip
    flags = (
        "ctx_len micro_bsz lr_init peft parts alpha r devices strategy dataload data_rows fields seed temperature top_p shots "
        "dtype as bone_config lora_config my_pile_stage train_type chunk_ctx quant val_split warmup_steps tokenizer stop"
    )
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(1, len(argv)) if len(argv) > 1 else 0
        match rng.choice(["replace", "replace", "lose", "double", "flag", "flag"]):
            case "replace" if at:
                argv[at] = rng.choice(values)
            case "lose" if at:
                del argv[at]
            case "double" if at:
                argv.insert(at, argv[at])
            case _:
                argv += [f"--{rng.choice(flags.split())}", rng.choice(values)]
    return argv


KINDS: dict[Callable[[random.Random], list[str]], int] = {  # and how many cases of each: a minute of CPU time in all
    base_model: 150, adapter: 250, state_file: 60, peft_folder: 150, safetensors_base: 100, rows: 200, binidx: 60, tokenizer: 100,
    vocabulary: 100, checkpoint: 12, record: 20, losses: 40, configuration: 200, template: 200, words: 200,
}  # fmt: skip

# ---------------------------------------------------------------- the verdict


class Hang(BaseException):
    pass


def hang(*_) -> None:
    raise Hang


def called(argv: list[str], folder: Path) -> tuple[int | str, str]:
    """Run a command in `folder`: its exit code, or the traceback of what it did not handle; and what it printed."""
    said = io.StringIO()
    here = os.getcwd()
    os.chdir(folder)
    signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run(lambda: COMMANDS[argv[0]](argv[1:]))
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    except BaseException:
        return traceback.format_exc(), said.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir(here)
    raise AssertionError


def case(kind: Callable[[random.Random], list[str]], number: int, world: Path, folder: Path) -> tuple[list[str], str]:
    """One case in the new `folder`: the command line, and what is wrong; "" where nothing is."""
    shutil.copytree(world, folder)
    (folder / "out").mkdir()
    rng = random.Random(f"{kind.__name__} {number}")
    os.chdir(folder)
    try:
        argv = kind(rng)
    finally:
        os.chdir(world)
    before = contents(folder)
    OUTSIDE.clear()
    WATCHED.append(str(folder))
    try:
        code, said = called(argv, folder)
    finally:
        WATCHED.pop()
    last = said.rstrip("\n").rpartition("\n")[2]
    if isinstance(code, str):
        return argv, code
    if code != 0 and not (code == 2 and last.startswith("error: ") and last.isprintable() and len(last) <= 1100):
        return argv, f"exit code {code}, and the last line is {last!r}"
    if "Traceback" in said:
        return argv, said
    if OUTSIDE:
        return argv, f"written outside the folder: {OUTSIDE}"
    after = contents(folder)
    if gone := [name for name, content in before.items() if not name.startswith(OWN) and after.get(name) != content]:
        return argv, f"changed or lost: {gone}"
    if left := [name for name in after if name.endswith((".tmp", ".part"))]:
        return argv, f"left half written: {left}"
    return argv, ""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WATCHED: list[str] = []
OUTSIDE: list[str] = []


def watch(event: str, args: tuple) -> None:
    """An audit hook: notes files that are made, changed or removed outside the folder of the case."""
    if not WATCHED:
        return
    if event == "open":
        path, _, flags = args
        writes = isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        paths = [path] if writes else []
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir", "os.link", "os.symlink"):
        paths = [path for path in args[:2] if isinstance(path, str)]
    else:
        return
    OUTSIDE.extend(path for path in map(os.path.abspath, paths) if not path.startswith((WATCHED[0], "/dev/")))


def main(kind: str, numbers: list[int], world: Path, log: Path) -> None:
    """Run cases of one kind; the log gets a line before each, and one after it for what is wrong."""
    by_name = {kind.__name__: kind for kind in KINDS}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    importlib.import_module("matplotlib.font_manager")  # makes its folder in HOME at the first import
    memory.estimate = lambda *_, **__: {"all": 0}  # seconds a case, and no file is in it
    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as file:
        for number in numbers:
            print(number, file=file, flush=True)
            argv, wrong = case(by_name[kind], number, world, Path(folder) / str(number))
            shutil.rmtree(Path(folder) / str(number))
            if wrong:
                print(json.dumps({"case": number, "argv": argv, "wrong": wrong}), file=file, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        numbers = [int(word) for word in sys.argv[2:]] or list(range(KINDS[globals()[sys.argv[1]]]))
        (Path(folder) / "world").mkdir()
        main(sys.argv[1], numbers, make_world(Path(folder) / "world"), log)
        for line in log.read_text().splitlines():
            if not line.isdigit():
                found = json.loads(line)
                print(found["case"], found["argv"], found["wrong"], sep="\n")
