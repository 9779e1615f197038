"""Time and memory of Bone's forward and backward beside a frozen projection, LoRA, MiSS, and Bone with a materialised weight.

    python benchmarks/bone.py                                     RWKV-6 1.6B, 512 to 16384 tokens, on the GPU if there is one
    python benchmarks/bone.py --models 1.6B 3B 7B --dtype bf16 --output benchmarks/results/bone.md

One run measures all of them in turn, several times, and takes each one's least time: the ratios are what counts. r = 64 for Bone
and MiSS and r = 32 for LoRA have the same number of parameters on a square projection. LoRA and MiSS are also Hugging Face peft's
where it is installed (test extra). Extra memory is the peak of what forward and backward allocate beside x, g, weight and
adapter, with the gradients that remain. On the CPU it is counted by watching the tensors that operations make. With one CPU
thread, the thread's own time is taken, so that other programs on the machine count little. On a GPU it is the GPU's own time.
"""

import argparse
import datetime
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_bone.doctor import cpu_name
from rwkv_bone.ops.float32 import set_matmul_backend
from rwkv_bone.peft import METHODS

SIZES = {"0.1B": (768, 2688), "1.6B": (2048, 7168), "3B": (2560, 8960), "7B": (4096, 14336)}  # C, F of RWKV-6 World
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
R = 64
REFERENCE = "frozen linear"


def shapes(model: str) -> dict[str, tuple[int, int, int]]:
    """The projections of one layer: name -> out, in, how many there are."""
    C, FFN = SIZES[model]
    return {f"{C} -> {C}": (C, C, 6), f"{C} -> {FFN}": (FFN, C, 1), f"{FFN} -> {C}": (C, FFN, 1)}


class MaterialisedBone(nn.Module):
    """W' = W + W B + B built whole at each step, and differentiated by autograd: what trainers of RWKV have done."""

    def __init__(self, weight: Tensor, r: int):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bone = nn.Parameter(weight.new_zeros(weight.shape[1] // r, r, r))

    def forward(self, x):
        out, in_ = self.weight.shape
        r = self.bone.shape[-1]
        blocks = self.weight.view(out // r, r, in_ // r, r).transpose(1, 2)
        update = (blocks @ self.bone + self.bone).transpose(1, 2).reshape(out, in_)
        return F.linear(x, self.weight + update)


def peft_layer(weight: Tensor, config) -> nn.Module:
    import peft

    base = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    base[0].weight = nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config(peft), autocast_adapter_dtype=False).base_model.model[0]


def contestants(weight: Tensor) -> dict[str, nn.Module]:
    def ours(name, r):
        layer = METHODS[name](weight, METHODS[name].Config(r=r))
        layer.start()
        return layer

    frozen = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    frozen.weight = nn.Parameter(weight, requires_grad=False)
    made = {REFERENCE: frozen, "Bone": ours("bone", R), "LoRA": ours("lora", R // 2), "MiSS": ours("miss", R)}
    try:
        made["LoRA (peft)"] = peft_layer(weight, lambda peft: peft.LoraConfig(r=R // 2, lora_alpha=R // 2, target_modules=["0"]))
        made["MiSS (peft)"] = peft_layer(weight, lambda peft: peft.MissConfig(r=R, target_modules=["0"]))
    except ImportError:
        print("peft is not installed: this program's own LoRA and MiSS stand alone")
    made["materialised Bone"] = MaterialisedBone(weight, R)
    made["Bone, column"] = ours("bone_col", R)
    return {name: layer.to(weight.device) for name, layer in made.items()}


def step(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; the gradients of x and of all that trains."""
    return torch.autograd.grad(layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)], g)


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that operations made and that still live."""

    def __init__(self, *given: Tensor):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and (storage := t.untyped_storage()).data_ptr() not in self.known and storage.nbytes():
                self.made(storage)
        return result

    def made(self, storage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.known.add(pointer)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.freed, pointer, size)

    def freed(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.live -= size


def extra_memory(layer: nn.Module, x: Tensor, g: Tensor) -> int:
    """Peak bytes that a step allocates."""
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, x, g)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes(x, g, *layer.parameters()) as watch:
        step(layer, x, g)
    return watch.peak


def seconds(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    if x.is_cuda:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which Python queues the step: a training's step is queued in time too
        began.record()
        step(layer, x, g)
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    step(layer, x, g)
    return now() - start


def measure(out: int, in_: int, tokens: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, tuple[float, int]]:
    """Least seconds and peak extra bytes of each contestant on one projection."""
    torch.manual_seed(0)
    weight = (torch.randn(out, in_) / in_**0.5).to(device, dtype)
    x = torch.randn(tokens, in_).to(device, dtype).requires_grad_()
    g = torch.randn(tokens, out).to(device, dtype)
    layers = contestants(weight)
    memory = {name: extra_memory(layer, x, g) for name, layer in layers.items()}  # and a first, slow step for each
    best = dict.fromkeys(layers, float("inf"))
    for _ in range(repeats):
        for name, layer in layers.items():
            best[name] = min(best[name], seconds(layer, x, g))
    return {name: (best[name], memory[name]) for name in layers}


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] + ["--:"] * (len(rows[0]) - 1), *rows[1:]])


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["1.6B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 4096, 16384])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--plain", action="store_true", help="float32 products as torch chooses them, not as train.py does")
    parser.add_argument("--square", action="store_true", help="the square projections alone, the most of them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the tables to it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = "" if args.plain else set_matmul_backend(args.device, min(args.tokens))
    by = f" by {library}" if library and args.dtype == "fp32" else ""

    head = (
        f"`benchmarks/bone.py`, {datetime.date.today()}, {hardware(args.device)}, {args.dtype}{by}, torch {torch.__version__}. "
        "Forward + backward of one projection, its weight frozen: ms (multiple of the frozen projection alone), peak extra MiB. "
        f"Times are the least of {args.repeats} interleaved repeats."
    )
    print(head)
    parts = [head]
    for model in args.models:
        for shape, (out, in_, count) in shapes(model).items():
            if args.square and out != in_:
                continue
            rows = [[f"{model}: {count} x {shape}", *(f"{tokens} tokens" for tokens in args.tokens)]]
            measured = [measure(out, in_, n, DTYPES[args.dtype], args.device, args.repeats) for n in args.tokens]
            for name in measured[0]:
                rows.append([name])
                for m in measured:
                    (time_, memory), (reference, _) = m[name], m[REFERENCE]
                    rows[-1].append(f"{time_ * 1e3:.1f} ({time_ / reference:.2f}x), {memory / 2**20:.0f}")
            parts.append(table(rows))
            print("\n" + parts[-1], flush=True)
    if args.output:
        with open(args.output, "a") as file:
            file.write("\n\n".join(parts) + "\n\n")


if __name__ == "__main__":
    main()
