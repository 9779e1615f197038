"""Greedy sampling, one token after the other: tokens/s of ours and of the `rwkv` package on the same model, in one run.

    ours              rwkv_bone.generate.step and argmax, a batch of 1 and of `--batch`
    rwkv, TorchScript the package, strategy "cpu fp32", RWKV_JIT_ON=1
    rwkv, plain       the same without TorchScript

Each runs in a process of its own, in turn, a repeat at a time; what did not choose the tokens that ours chose is marked. With one
thread, "least time" and "median" are of the thread's own time, which on a shared machine says more than the clock's.

`python benchmarks/sampling.py [--model M.pth | --n_layer 12 --n_embd 768] [--threads 1]`
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rwkv_bone.doctor import cpu_name
from rwkv_bone.files.models import load_model, open_model
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.models import MODELS

VARIANTS = ("ours", "ours, batch", "rwkv, TorchScript", "rwkv, plain")
DEMO = Path(__file__).parents[1] / "rwkv_bone" / "demo" / "base.pth"
PROMPT = [1, 2, 3, 5, 8, 13, 21, 34]


def ours(path: str, batch: int, dtype: torch.dtype) -> Callable[[int], list[int]]:
    from rwkv_bone.generate import read, step

    model = load_model(path, dtype).for_sampling()

    def sample(count: int) -> list[int]:
        logits, state = read(model, [PROMPT] * batch)
        tokens = []
        for _ in range(count):
            chosen = logits.argmax(-1)
            tokens.append(chosen.tolist()[0])
            logits, state = step(model, chosen, state)
        return tokens

    return sample


def package(path: str, script: bool) -> Callable[[int], list[int]]:
    v7 = open_model(path).kind.version == "x070"
    os.environ.update(RWKV_V7_ON=str(int(v7)), RWKV_CUDA_ON="0", RWKV_JIT_ON=str(int(script)))  # read as the package is imported
    from rwkv.model import RWKV as Package

    model = Package(model=path.removesuffix(".pth"), strategy="cpu fp32")

    def sample(count: int) -> list[int]:
        logits, state = model.forward(PROMPT, None)
        tokens = []
        for _ in range(count):
            tokens.append(logits.argmax().item())
            logits, state = model.forward(tokens[-1:], state)
        return tokens

    return sample


def work(args: argparse.Namespace) -> None:
    """A repeat for each line of input; times and tokens as a line of json."""
    torch.set_num_threads(args.threads)
    out = sys.stdout
    sys.stdout = sys.stderr  # the package prints as it loads
    if args.variant.startswith("ours"):
        sample = ours(args.model, args.batch if args.variant == "ours, batch" else 1, getattr(torch, args.dtype))
    else:
        sample = package(args.model, args.variant == "rwkv, TorchScript")
    sample(32)
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.thread_time()
        tokens = sample(args.tokens)
        times = {"processor": time.thread_time() - processor, "clock": time.perf_counter() - clock}
        print(json.dumps({**times, "tokens": tokens}), file=out, flush=True)


def new_model(args: argparse.Namespace, folder: str) -> str:
    path = Path(folder) / "random.pth"
    kind = MODELS[args.version]
    sizes = kind.new_sizes(vocab_size=args.vocab_size, n_layer=args.n_layer, n_embd=args.n_embd, head_size=64)
    tensors = kind(sizes).initialise(0).state_dict()
    for name, value in tensors.items():  # a fresh model's outputs and LoRAs are zero
        if not value.any() and value.dim() > 1:
            value.normal_(std=value.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(len(name)))
    save_tensors(path, tensors)
    return str(path)


def compare(args: argparse.Namespace) -> None:
    sizes = open_model(args.model).sizes
    print(f"L{sizes.n_layer} C{sizes.n_embd} V{sizes.vocab_size}, heads of {sizes.head_size}, {args.dtype}; "
          f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}; "
          f"{args.repeats} repeats of {args.tokens} tokens")  # fmt: skip
    workers = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant]
        for name in ("model", "batch", "dtype", "tokens", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        workers[variant] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeats):
        for variant, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            runs[variant].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    expected = runs["ours"][0]["tokens"]
    kind = "processor" if args.threads == 1 else "clock"
    best = min(run[kind] for run in runs["ours"])
    print(f"{'tokens/s':22}{'least time':>12}{'median':>10}{'clock':>10}{'time of ours':>14}")
    for variant, each in runs.items():
        rows = args.batch if variant == "ours, batch" else 1
        tokens = args.tokens * rows
        least, median = min(run[kind] for run in each), statistics.median(run[kind] for run in each)
        clock = min(run["clock"] for run in each)
        name = f"ours, batch of {rows}" if variant.startswith("ours") else variant
        same = sum(a == b for a, b in zip(each[0]["tokens"], expected)) / args.tokens
        note = "" if same == 1 else f"   {same:.0%} of the same tokens"
        print(f"{name:22}{tokens / least:12,.0f}{tokens / median:10,.0f}{tokens / clock:10,.0f}"
              f"{least / rows / best:13.2f}x{note}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), metavar="M.pth", help="default: the demo model")
    for name, default in dict(n_layer=0, n_embd=0, vocab_size=16384, batch=16, tokens=100, repeats=15, threads=1).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--version", default="x060", choices=tuple(MODELS), help="of a random model (--n_layer, --n_embd)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of ours")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.n_layer and args.n_embd:
            args.model = new_model(args, folder)
        compare(args)


if __name__ == "__main__":
    main()
