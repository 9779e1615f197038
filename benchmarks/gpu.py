"""All that awaits a GPU, in the order of its worth, in the minutes that there are: see benchmarks/README.md.

    bash benchmarks/gpu.sh [FOLDER] [--minutes 9]         FOLDER: benchmarks/results/gpu-DATE
    bash benchmarks/gpu.sh FOLDER --rehearse              on the CPU, with tiny sizes: every stage's code runs once

Each stage is a process of its own with a limit of its own, so that none ends another. What it finds is written to FOLDER as it is
found: STAGE.jsonl (a line a result) and STAGE.txt (what was printed). At the end FOLDER/summary.txt has it all on one screen.
"""

import argparse
import datetime
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
GPU_TESTS = [f"tests/test_{name}.py" for name in ("bone_cuda", "recurrence_gpu")]


class Stage:
    """Where a stage's results go, and whether it is rehearsed."""

    def __init__(self, name: str, folder: Path, rehearse: bool):
        self.name, self.folder, self.rehearse = name, folder, rehearse
        self.device = "cpu" if rehearse else "cuda"

    def record(self, item: str, **found: Any) -> None:
        """Keep and print a result: numbers and words by name."""
        with open(self.folder / f"{self.name}.jsonl", "a") as file:
            file.write(json.dumps({"item": item, **found}) + "\n")
        print(f"{item}: {in_words(found)}", flush=True)

    def attempt(self, item: str, function: Callable[[], dict[str, Any]]) -> None:
        """Record what `function` finds, or what it ended with: the next one comes all the same."""
        began = time.monotonic()
        try:
            found = function()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        self.record(item, **found, took_s=round(time.monotonic() - began, 1))
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def of_machine(self, name: str) -> float:
        """A ceiling that the first stage measured, or NaN."""
        file = self.folder / "machine.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        return next((line[name] for line in lines if name in line), float("nan"))


def in_words(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())


def seconds(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Least seconds of a call after a first one."""
    from wkv6 import timed

    call()
    return min(timed(call, device)[1] for _ in range(repeats))


# ---------------------------------------------------------------- the stages


def machine(stage: Stage) -> None:
    from rwkv_bone.ops import cuda

    def about() -> dict[str, Any]:
        from rwkv_bone.doctor import cpu_name
        from rwkv_bone.ops.selfcheck import circumstances

        where = circumstances(torch.device("cuda", 0)) if not stage.rehearse else {"torch": torch.__version__}
        missing = [n for n in ("fla", "peft", "bitsandbytes", "deepspeed", "pytest", "triton") if not importlib.util.find_spec(n)]
        return {**where, "CPU": cpu_name(), "missing": " ".join(missing) or "nothing"}

    def ceilings() -> dict[str, Any]:
        n = 64 if stage.rehearse else 8192
        x = torch.zeros(n * n * 16, dtype=torch.uint8, device=stage.device)
        y = torch.empty_like(x)
        a, b = torch.randn(2, n, n, device=stage.device, dtype=torch.bfloat16)
        copied, product = (seconds(call, stage.device) for call in (lambda: y.copy_(x), lambda: a @ b))
        return {"copy_TB/s": 2 * x.nbytes / copied / 1e12, "bf16_TFLOP/s": 2 * n**3 / product / 1e12}

    stage.attempt("about", about)
    stage.attempt("ceilings", ceilings)
    names = ["wkv7_chunk", "wkv6_chunk", "bone", "wkv7_sequential", "wkv6_sequential"][: 1 if stage.rehearse else None]
    capability = (8, 0) if stage.rehearse else torch.cuda.get_device_capability()
    cache = stage.folder / "built" if stage.rehearse else None
    if cache:
        names = ["bone"]
        cache.mkdir(exist_ok=True)

    def build(name: str) -> None:
        stage.attempt(f"build {name}", lambda: {"library": cuda.build_library(name, capability, cache).name})

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(build, names))


def check(stage: Stage) -> None:
    """The self-check of each kernel, then the tests for GPUs, the fast ones first; fla at last, which compiles for long."""
    from rwkv_bone.ops import selfcheck, wkv6, wkv7

    bf16, fp32, gpu = torch.bfloat16, torch.float32, torch.device("cuda", 0)

    def verdict(recurrence, kernel: str, dtype: torch.dtype) -> None:
        def find() -> dict[str, Any]:
            if stage.rehearse:
                run = selfcheck.by_autograd(recurrence.chunked)
                found = selfcheck.examine(run, recurrence, kernel, dtype, 8, "cpu", heads=2)
            else:
                found = selfcheck.verdict(recurrence.name, kernel, dtype, 64, gpu)
            return {"ok" if found.ok else "WRONG": found.text}

        stage.attempt(f"{recurrence.name} {kernel} {str(dtype)[6:]}", find)

    both = (wkv7.recurrence, wkv6.recurrence)
    if stage.rehearse:
        verdict(wkv7.recurrence, "sequential", fp32)
        return stage.attempt(GPU_TESTS[0], lambda: pytest(GPU_TESTS[0], "-k", "on_a_gpu"))
    for kernel, dtype in (("chunk", bf16), ("sequential", fp32), ("sequential", bf16)):
        for recurrence in both:
            verdict(recurrence, kernel, dtype)
    stage.attempt("bone", lambda: vars(selfcheck.verdict("bone", "bone", bf16, 0, gpu)))
    for file in GPU_TESTS:
        stage.attempt(file, lambda file=file: pytest(file, "-k", "not 32_bits and not 4096"))
    stage.attempt("large", lambda: pytest(*GPU_TESTS, "-k", "32_bits or 4096"))
    for recurrence in both:
        if importlib.util.find_spec("fla"):
            verdict(recurrence, "fla", bf16)
        else:
            stage.record(f"{recurrence.name} fla", skipped="fla-core is not installed")


def pytest(*arguments: str, before: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """What the tests say in their last line."""
    if not importlib.util.find_spec("pytest"):
        return {"skipped": "pytest is not installed"}
    options = ["-q", "--maxfail", "10", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [*before, sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    last = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"tests" if done.returncode in (0, 5) else "failed": last.strip("= ")}  # 5: there was nothing to run


def recurrences(stage: Stage) -> None:
    import wkv6
    import wkv7

    shapes = [(8, 4096, 64, 64), (8, 4096, 32, 64), (1, 4096, 32, 64), (1, 1024, 32, 64)]
    shapes = [(1, 32, 2, 64)] if stage.rehearse else shapes
    dtype = torch.float32 if stage.rehearse else torch.bfloat16
    modules = {"wkv7": wkv7, "wkv6": wkv6}
    # ours at every shape first: what others compile takes long
    for ours, shape, name in ((o, s, n) for o in (True, False) for s in shapes for n in modules):

        def measure(ours=ours, shape=shape, module=modules[name]) -> dict[str, Any]:
            peers = {n: f for n, f in module.contestants(stage.device).items() if (n == wkv6.OURS) == ours}
            inputs, gy, gfinal = module.make_inputs(shape, dtype, stage.device)
            least = wkv6.least_times(peers, inputs, gy, gfinal, stage.device, 1 if stage.rehearse else 5)
            found = {who: f"{1e3 * f:.2f} + {1e3 * b:.2f} ms" for who, (f, b) in least.items()}
            if ours:
                floor = [n / stage.of_machine("copy_TB/s") / 1e12 for n in module.memory_bytes(shape, dtype)]
                found["floor"] = f"{1e3 * floor[0]:.2f} + {1e3 * floor[1]:.2f} ms"
                found["share"] = f"{sum(floor) / sum(least[wkv6.OURS]):.0%}"
                found["kernel"] = module.describe(stage.device, dtype, shape[-1])
            return found

        stage.attempt(f"{name} B{shape[0]} T{shape[1]} C{shape[2] * 64}", measure)


def projections(stage: Stage) -> None:
    """Bone's layer beside LoRA, the materialised form and peft's."""
    import bone

    cases = [(2048, 2048, 4096), (2048, 2048, 32768), (7168, 2048, 4096), (4096, 4096, 4096)]  # out, in, tokens
    cases = [(64, 64, 32)] if stage.rehearse else cases
    for out, in_, tokens in cases:

        def measure(out=out, in_=in_, tokens=tokens) -> dict[str, Any]:
            found = bone.measure(out, in_, tokens, torch.bfloat16, stage.device, 1 if stage.rehearse else 10)
            frozen = found[bone.REFERENCE][0]
            return {name: f"{took / frozen:.2f}x {kept / 2**20:.0f} MiB" for name, (took, kept) in found.items()}

        stage.attempt(f"{out} x {in_}, {tokens} tokens", measure)


def model(version: str, layers: int, n_embd: int, vocab: int, device: str, quant: str, grad_cp: bool):
    """A model with random weights and Bone, in bf16, made on the device."""
    from rwkv_bone.models import MODELS, Execution
    from rwkv_bone.peft import METHODS, inject
    from rwkv_bone.peft.quant import quantise_model

    kind = MODELS[version]
    with torch.device("meta"):
        made = kind(kind.new_sizes(vocab_size=vocab, n_layer=layers, n_embd=n_embd, head_size=64), Execution("auto", grad_cp))
    made.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.fill_(1) if p.dim() == 1 and name.endswith("weight") else p.normal_(std=0.02)
    if quant != "none":
        quantise_model(made, quant)
    inject(made, METHODS["bone"], METHODS["bone"].config_from({"r": 16 if device == "cpu" else 64}, "bone"))
    return made.to(device)


# GB that RWKV-PEFT takes on an RTX 4090, by the README of JL-er/RWKV-PEFT (ctx_len 1024, micro_bsz 1, bf16, deepspeed_stage_1):
# RWKV-7 1.5B with DiSHA (MiSS) r 32, RWKV-6 1.6B with LoRA r 64; its "QLoRA" is taken for nf4. It gives no speeds.
PUBLISHED = {"x070 none": 5.6, "x070 int8": 4.5, "x070 nf4": 3.9, "x060 none": 7.4, "x060 nf4": 5.6}


def steps(stage: Stage) -> None:
    """The whole step at the releases' sizes: tokens/s, share of the product's ceiling, memory beside our estimate and, for one
    document of 1,024 tokens, beside what RWKV-PEFT publishes."""
    from rwkv_bone.config import TrainConfig
    from rwkv_bone.training.loss import cross_entropy_sum
    from rwkv_bone.training.memory import CUDA_ITSELF, estimate

    sizes = (2, 64, 128) if stage.rehearse else (24, 2048, 65536)
    shapes = [(1, 32, True)] if stage.rehearse else [(8, 4096, True), (1, 1024, True)]
    kinds = [(v, q, s) for s in shapes for q in ("none", "int8", "nf4") for v in ("x070", "x060")]
    kinds = [k for k in kinds if not stage.rehearse or k[0] == "x070"]
    for version, quant, (B, T, grad_cp) in sorted(kinds, key=lambda k: (k[1] != "none", -k[2][0])):

        def measure(version=version, quant=quant, B=B, T=T, grad_cp=grad_cp) -> dict[str, Any]:
            if quant == "nf4" and not importlib.util.find_spec("bitsandbytes"):
                return {"skipped": "bitsandbytes is not installed"}
            made = model(version, *sizes, stage.device, quant, grad_cp)
            trained = [p for p in made.parameters() if p.requires_grad]
            optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=stage.device == "cuda")
            idx = torch.randint(sizes[2], (B, T + 1), device=stage.device)

            def step() -> None:
                hidden, _ = made.hidden(idx[:, :-1])
                (cross_entropy_sum(hidden, made.head.weight, idx[:, 1:]) / idx.numel()).backward()
                optimiser.step()
                optimiser.zero_grad()

            if stage.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds(step, stage.device, 3)
            cuda = stage.device == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            config = TrainConfig(data_file="-", peft="bone", grad_cp=grad_cp)
            ours = sum(estimate(made, B, T, config, cuda=cuda).values()) - CUDA_ITSELF * cuda
            L, C, V = sizes
            # a frozen base: two products of a weight's size forward and back, no third for its gradient
            weights = L * C * C * (5 + 3.5 * 2 + 1 if version == "x060" else 4 + 8) + C * V
            flops = 4 * weights * B * T
            known = PUBLISHED.get(f"{version} {quant}") if B == 1 else None
            within = "within 15%" if abs(ours / peak - 1) < 0.15 or not cuda else "OFF by more than 15%"
            return {
                "tokens/s": B * T / took, "ms": 1e3 * took, "MFU": flops / took / 1e12 / stage.of_machine("bf16_TFLOP/s"),
                "peak_GiB": peak / GIB, "estimate_GiB": ours / GIB, "estimate": within,
                **({"RWKV-PEFT_4090_GB": known} if known else {}),
            }  # fmt: skip

        stage.attempt(f"{version} {quant} B{B} T{T}{' grad_cp' * grad_cp}", measure)


def training(stage: Stage) -> None:
    """The same short training of new tiny models on the GPU and on the CPU."""
    data = stage.folder / "training.jsonl.data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} + {i} = {2 * i}. " * 4}) + "\n" for i in range(64)))
    for version in ("x070", "x060")[: 1 if stage.rehearse else 2]:

        def compare(version=version) -> dict[str, Any]:
            losses = {}
            for device in ("cpu", stage.device if stage.device == "cuda" else "again"):
                folder = stage.folder / f"run-{version}-{device}"
                flags = {
                    "my_testing": version, "n_layer": 2, "n_embd": 128, "vocab_size": 256, "peft": "none", "lr_init": 1e-3,
                    "data_file": data, "ctx_len": 64, "micro_bsz": 8, "epoch_steps": 2 if stage.rehearse else 8,
                    "tokenizer": "byte", "precision": "bf16", "proj_dir": folder, "devices": 1, "overwrite": 1,
                    "accelerator": "gpu" if device == "cuda" else "cpu",
                }  # fmt: skip
                command = [sys.executable, str(ROOT / "train.py"), *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]
                done = subprocess.run(command, capture_output=True, text=True)
                print(done.stdout[-3000:], done.stderr[-2000:], flush=True)
                if done.returncode:
                    return {"failed": f"{device}: {(done.stderr.strip().splitlines() or [''])[-1][:160]}"}
                losses[device] = [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]
            one, other = losses.values()
            off = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
            return {"first": one[0], "last": other[-1], "off": off, "equal" if off < 1e-2 else "WRONG": "within bf16: 1e-2"}

        stage.attempt(version, compare)


def sanitizers(stage: Stage) -> None:
    tests = (*GPU_TESTS, "-k", "sanitizer or on_a_gpu")
    checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    # memcheck: every tensor an allocation of its own, or what is written beyond it lies in another of torch's
    tools = (("memcheck", ("--report-api-errors", "no")), ("racecheck", ()), ("synccheck", ()))
    for tool, more in tools[: 1 if stage.rehearse else 3]:
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        before = (checker, "--error-exitcode", "1", "--tool", tool, *more) if checker and not stage.rehearse else ()
        if not checker and not stage.rehearse:
            stage.record(tool, skipped="compute-sanitizer is not here")
        else:
            stage.attempt(tool, lambda before=before, env=environment: pytest(*tests, before=before, **env))


# stage, its share of the time at the most; what a stage leaves goes to the later ones
STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {
    "machine": (machine, 0.2), "check": (check, 0.3), "recurrences": (recurrences, 0.2), "projections": (projections, 0.12),
    "steps": (steps, 0.35), "training": (training, 0.2), "sanitizers": (sanitizers, 1.0),
}  # fmt: skip


# ---------------------------------------------------------------- all of them


def orchestrate(commands: dict[str, tuple[list[str], float]], folder: Path, total: float) -> dict[str, str]:
    """Run each command within its limit in seconds and what is left of `total`; how each ended. What it prints goes to
    FOLDER/NAME.txt and to the terminal."""
    ended, deadline = {}, time.monotonic() + total
    for name, (command, limit) in commands.items():
        began, limit = time.monotonic(), min(limit, deadline - time.monotonic())
        if limit < 1:
            ended[name] = "not begun: no time was left"
            continue
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        with open(folder / f"{name}.txt", "w") as log:
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, **output, start_new_session=True)
            timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    print(line, end="", flush=True)
                code = process.wait()
            finally:
                late = not timer.is_alive()
                timer.cancel()
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        took = f"{time.monotonic() - began:.0f} s"
        ended[name] = f"cut off after {took}" if late else took if code == 0 else f"ended with {code} after {took}"
    return ended


def summary(folder: Path, ended: dict[str, str]) -> str:
    """One screen: a line a result, cut to the terminal's width."""
    lines = [f"{datetime.date.today()}, {folder}"]
    for name, how in ended.items():
        lines.append(f"{name} ({how})")
        file = folder / f"{name}.jsonl"
        for line in file.read_text().splitlines() if file.exists() else ():
            found = json.loads(line)
            found.pop("took_s", None)
            lines.append(f"  {found.pop('item'):28} {in_words(found)}"[:180])
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = (args.folder or ROOT / "benchmarks" / "results" / f"gpu-{datetime.date.today()}").resolve()
    if args.stage:
        STAGES[args.stage][0](Stage(args.stage, folder, args.rehearse))
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("torch sees no GPU here; --rehearse runs all of it on the CPU with tiny sizes", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    own = [sys.executable, str(Path(__file__).resolve()), str(folder), *["--rehearse"] * args.rehearse, "--stage"]
    total = args.minutes * 60 * (3 if args.rehearse else 1)  # a machine without a GPU is slow
    ended = orchestrate({name: ([*own, name], share * total) for name, (_, share) in STAGES.items()}, folder, total)
    text = summary(folder, ended)
    (folder / "summary.txt").write_text(text)
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
