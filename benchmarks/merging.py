"""CPU seconds and peak memory of merging a Bone adapter into a large model, on one thread, by part.

    python benchmarks/merging.py [--layers 24] [--n_embd 2048] [--folder TMP] [--output benchmarks/results/merging.txt]

Makes a random RWKV-6 in bf16 (1.6B, 3.2 GB, by default) and a Bone adapter, and merges them. Beside it: torch.load and torch.save
of the same file, which is what any merging that reads and writes with torch takes at the least, and a copy by the disk's own
means. Each runs in a process of its own; peak memory is the resident set's, of which importing torch is printed alone.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rwkv_bone.doctor import cpu_name
from rwkv_bone.files.adapters import save_adapter
from rwkv_bone.files.models import fingerprint, identity, open_model
from rwkv_bone.files.pth import write_pth
from rwkv_bone.models.x060 import RWKV6
from rwkv_bone.peft import METHODS, inject
from rwkv_bone.peft.adapter import adapter_tensors

R = 64
PROLOGUE = "import json, resource, sys, time, torch; torch.set_num_threads(1); start = time.process_time()\n"
EPILOGUE = """
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
print("measured", json.dumps({"cpu": time.process_time() - start, "peak": peak, "parts": globals().get("parts", {})}))
"""
PROGRAMS = {
    "importing torch": "",
    "copying the file": "import shutil; shutil.copyfile(base, output)",
    "torch.load, torch.save": "torch.save(torch.load(base, mmap=True), output)",
    "merge.py": """
import functools
parts = {}
inside = 0.0
def timed(part, f):  # an inner part's time is taken from the outer one's
    @functools.wraps(f)
    def call(*args, **kwargs):
        global inside
        outer, inside, began = inside, 0.0, time.process_time()
        try:
            return f(*args, **kwargs)
        finally:
            took = time.process_time() - began
            parts[part] = parts.get(part, 0.0) + took - inside
            inside = outer + took
    return call
from rwkv_bone.merging import command, merge
from rwkv_bone.files import adapters, pth
merge.Merge.__init__ = timed("opening base and adapter", merge.Merge.__init__)
panels = adapters.Adapter.merged_panels
def timed_panels(*args):
    items = panels(*args)
    return iter(timed("W' from W and B", lambda: next(items, None)), None)
adapters.Adapter.merged_panels = timed_panels
merge.Merge.changed = timed("rounding, and what the report says", merge.Merge.changed)
pth.Streamed.renew = timed("giving pages back", pth.Streamed.renew)
pth.record = timed("checksum and writing", pth.record)
command.main(["--base_model", base, "--peft_checkpoint", adapter, "--output", output, "--overwrite"])
parts["everything else"] = time.process_time() - start - sum(parts.values())
""",
    "merge.py --verify": """
from rwkv_bone.merging import command
command.main(["--base_model", base, "--peft_checkpoint", adapter, "--output", output, "--overwrite", "--verify"])
""",
}


def make_files(folder: Path, layers: int, n_embd: int) -> None:
    """base.pth and adapter.pth: values of the usual sizes, drawn from one block of random numbers."""
    kind = RWKV6
    sizes = kind.new_sizes(vocab_size=65536, n_layer=layers, n_embd=n_embd)
    numbers = (torch.randn(2**24 + 12345) * 0.02).bfloat16()
    layout = {name: (torch.bfloat16, shape) for name, shape in kind.shapes(sizes).items()}

    def tensors():
        for name, (_, shape) in layout.items():
            n = torch.Size(shape).numel()
            yield name, numbers.repeat(-(-n // len(numbers)))[:n].view(shape)

    write_pth(folder / "base.pth", layout, tensors())
    opened = open_model(folder / "base.pth")
    with torch.device("meta"):
        model = kind(opened.sizes)
        inject(model, METHODS["bone"], METHODS["bone"].Config(R), start=False)
    model.fingerprint = fingerprint(opened.tensors)
    trained = {name: torch.randn(t.shape) * 1e-3 for name, t in adapter_tensors(model).items()}
    base = identity(folder / "base.pth", model)
    save_adapter(folder / "adapter.pth", trained, {"method": "bone", "options": {"r": R}, "base": base, "step": 1})


def measure(program: str, folder: Path) -> dict:
    given = {"base": folder / "base.pth", "adapter": folder / "adapter.pth", "output": folder / "output.pth"}
    names = "".join(f"{name} = {str(path)!r}\n" for name, path in given.items())
    root = Path(__file__).resolve().parents[1]
    argv = [sys.executable, "-c", PROLOGUE + names + program + EPILOGUE]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    (folder / "output.pth").unlink(missing_ok=True)
    return json.loads(done.stdout.split("measured")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--folder", help="where to put the files (default: the system's folder for temporary ones)")
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_files(folder, args.layers, args.n_embd)
        size = (folder / "base.pth").stat().st_size / 1e9
        lines = [
            f"RWKV-6, {args.layers} layers, n_embd {args.n_embd}, bf16, {size:.2f} GB; Bone, r {R}; one thread",
            f"{cpu_name()}, torch {torch.__version__}, {datetime.date.today()}",
            f"{'':40}{'CPU s':>8}{'peak GiB':>10}",
        ]
        print("\n".join(lines), flush=True)
        for label, program in PROGRAMS.items():
            found = measure(program, folder)
            new = [f"{label:40}{found['cpu']:8.1f}{found['peak']:10.2f}"]
            new += [f"    {part:36}{seconds:8.1f}" for part, seconds in found["parts"].items()]
            print("\n".join(new), flush=True)
            lines += new
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
