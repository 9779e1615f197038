"""One training step (forward, backward, AdamW) of an RWKV-6 or RWKV-7: tokens/s and peak memory, ours against others in one run.

    ours          Bone as it is here
    materialised  Bone as RWKV-PEFT computes it: W' is formed at each use, by plain autograd
    peft LoRA     Hugging Face peft's LoRA of half the rank on the same model (the same number of trained parameters)
    rwkv7-hf      the model of that package, with peft's LoRA
    rwkvtune      the model of that package, with its own LoRA

The last two have RWKV-7 alone, and are measured with `--peers FOLDER`, where they are installed (benchmarks/README.md).
Where train.py multiplies float32 otherwise than torch does by itself (rwkv_bone/ops/float32.py), ours are measured again as torch
does. Each runs in a process of its own on a random model of the same sizes; the ratios are to ours. On one CPU thread the time is
the processor's, which on a shared machine says more than the clock's.
`python benchmarks/train_step.py --n_layer 12 --n_embd 768 --micro_bsz 2 --ctx_len 512`
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F

from rwkv_bone.doctor import cpu_name
from rwkv_bone.models import MODELS, Execution
from rwkv_bone.ops.float32 import set_matmul_backend
from rwkv_bone.peft import METHODS, adapters, inject
from rwkv_bone.peft.bone import BoneLinear
from rwkv_bone.training.loss import cross_entropy_sum

VARIANTS = ("ours", "materialised", "peft LoRA")
PEERS = ("rwkv7-hf", "rwkvtune")
PLAIN = ", plain"  # products as torch chooses them


class MaterialisedBone(BoneLinear):
    """W' = W + W B + B, formed at each use; plain autograd goes back through it. For r that divides both sizes."""

    def forward(self, x):
        out, in_ = self.weight.shape
        r = self.config.r
        blocks = self.weight.view(out // r, r, in_ // r, r).permute(0, 2, 1, 3)  # (n, m, r, r)
        bone = self.bone.to(self.weight.dtype)
        merged = (blocks + blocks @ bone + bone).permute(0, 2, 1, 3).reshape(out, in_)
        return x @ merged.T


def adapt(model: torch.nn.Module, variant: str, r: int) -> None:
    if variant == "peft LoRA":
        from peft import LoraConfig, inject_adapter_in_model

        targets = r".*\.(att\.(receptance|key|value|gate|output)|ffn\.(key|receptance|value))"
        inject_adapter_in_model(LoraConfig(r=r // 2, lora_alpha=r // 2, target_modules=targets), model)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        return
    method = METHODS["bone"] if variant == "ours" else MaterialisedBone
    inject(model, method, method.Config(r))
    assert adapters(model)


def peer(variant: str, sizes: Any, r: int) -> torch.nn.Module:
    """Another program's RWKV-7 of these sizes with a LoRA of half the rank on the same projections."""
    if variant == "rwkv7-hf":
        from peft import LoraConfig, get_peft_model
        from rwkv7_hf.configuration_rwkv7 import RWKV7Config
        from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

        ranks = {f"{theirs}_low_rank_dim": getattr(sizes, f"d_{ours}_lora")
                 for theirs, ours in {"decay": "decay", "a": "aaa", "v": "mv", "gate": "gate"}.items()}  # fmt: skip
        config = RWKV7Config(vocab_size=sizes.vocab_size, hidden_size=sizes.n_embd, num_hidden_layers=sizes.n_layer,
                             head_dim=sizes.head_size, intermediate_size=sizes.dim_ffn, use_cache=False, **ranks)  # fmt: skip
        targets = r".*layers\..*\.([rkvo]_proj|key|value)"
        return get_peft_model(RWKV7ForCausalLM(config), LoraConfig(r=r // 2, lora_alpha=r // 2, target_modules=targets))
    from rwkvtune.models.rwkv7.config import SimpleTrainConfig
    from rwkvtune.models.rwkv7.model import RWKV7Model
    from rwkvtune.peft.config import LoraConfig
    from rwkvtune.peft.peft_model import get_peft_model

    ranks = {"dim_att_lora": sizes.d_decay_lora, "dim_mv_lora": sizes.d_mv_lora, "dim_gate_lora": sizes.d_gate_lora}
    config = SimpleTrainConfig(n_layer=sizes.n_layer, n_embd=sizes.n_embd, vocab_size=sizes.vocab_size, **ranks)
    targets = ["receptance", "key", "value", "output"]
    return get_peft_model(RWKV7Model(config), LoraConfig(r=r // 2, lora_alpha=r // 2, target_modules=targets))


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    if args.variant in VARIANTS:
        set_matmul_backend(args.device, args.micro_bsz * args.ctx_len)
    kind = MODELS[args.version]
    sizes = kind.new_sizes(vocab_size=args.vocab_size, n_layer=args.n_layer, n_embd=args.n_embd, head_size=64)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if args.variant in PEERS:
        model = peer(args.variant, sizes, args.r).to(args.device, dtype)
    else:
        model = kind(sizes, Execution(grad_cp=args.grad_cp)).initialise().to(args.device, dtype)
        adapt(model, args.variant.removesuffix(PLAIN), args.r)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    idx = torch.randint(sizes.vocab_size, (args.micro_bsz, args.ctx_len + 1), device=args.device)

    def loss() -> torch.Tensor:
        if args.variant in PEERS:
            logits = model(idx[:, :-1])
            return F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), idx[:, 1:].flatten())
        hidden, _ = model.hidden(idx[:, :-1])
        return cross_entropy_sum(hidden, model.head.weight, idx[:, 1:]) / idx.numel()

    def step():
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    base = peak_bytes(args.device)
    step()
    if args.profile:
        profile_step(step, args.device)
        sys.exit()
    times = []
    now = time.process_time if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(args.repeats):
        began = now()
        step()
        times.append(now() - began)
    return {
        "seconds": min(times),
        "peak": peak_bytes(args.device) - base,
        "trained": sum(p.numel() for p in trained),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


def profile_step(step, device: str) -> None:
    """Print where one step's time goes: matrix products, WKV6, and the largest of the rest."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        name = event.key
        kind = "matrix products" if name in PRODUCTS or "gemm" in name else "WKV" if "wkv" in name else name
        kind = "Bone's kernels" if "BoneFunction" in name else kind
        times[kind] = times.get(kind, 0) + own
    total = sum(times.values())
    share = sum(times.get(kind, 0) for kind in ("matrix products", "Bone's kernels", "WKV")) / total
    print(f"{share:.1%} of {total / 1e6:.2f} s in matrix products, Bone's kernels and WKV")
    for name, time_ in sorted(times.items(), key=lambda item: -item[1])[:12]:
        print(f"{time_ / total:7.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="x060", choices=tuple(MODELS))
    for name, default in dict(n_layer=6, n_embd=512, vocab_size=16384, micro_bsz=2, ctx_len=512, r=64, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="bf16 on a GPU and fp32 on a CPU, unless told")
    parser.add_argument("--grad_cp", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the time of one step of ours goes, and end")
    parser.add_argument("--peers", metavar="FOLDER", help="with rwkv7-hf and rwkvtune: measure them, too")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    head = (
        f"L{args.n_layer} C{args.n_embd} V{args.vocab_size}, {args.micro_bsz} x {args.ctx_len} tokens, r={args.r}, {args.dtype}; "
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if args.profile:
        print(head)
        args.variant = "ours"
    if args.variant:
        print(json.dumps(measure(args)))
        return
    print(head)
    results = {}
    variants = [*VARIANTS]
    if set_matmul_backend(args.device, args.micro_bsz * args.ctx_len) and args.dtype == "fp32":
        variants += [variant + PLAIN for variant in VARIANTS]
    environment = dict(os.environ)
    if args.peers:
        variants += PEERS
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), args.peers]))
    for variant in variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode == 0:
            results[variant] = json.loads(run.stdout.splitlines()[-1])
        elif variant == "ours":
            sys.exit(run.stderr)
        else:  # out of memory, or peft is not installed
            print(f"without {variant}: {(run.stderr.strip().splitlines() or [f'exit status {run.returncode}'])[-1][:200]}")
    tokens, ours = args.micro_bsz * args.ctx_len, results["ours"]
    print(f"{'':20}{'s/step':>8}{'tokens/s':>10}{'time':>7}{'step memory':>13}{'memory':>8}{'trained':>12}")
    for name, r in results.items():
        print(f"{name:20}{r['seconds']:8.3f}{tokens / r['seconds']:10,.0f}{r['seconds'] / ours['seconds']:6.2f}x"
              f"{r['peak'] / 2**20:9,.0f} MiB{r['peak'] / ours['peak']:7.2f}x{r['trained']:12,}")  # fmt: skip


if __name__ == "__main__":
    main()
